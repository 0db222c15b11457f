"""A prompt of 8192 tokens through one layer of a DeepSeek-shaped model: stock torch.compile and mlacompile, time
and memory.

With a StaticCache stock code expands all that the cache could hold and attends under a mask; without a cache it
attends
causally, and there is nothing to win. Random weights, dense MLP, vocabulary 1024; every call starts on an empty
cache. The
logits of both are compared, and with eager code in the same dtype.

    python benchmarks/prefill.py                                   the whole table, on a GPU: about two minutes
    python benchmarks/prefill.py --models v3 --caches static       a part of it
    python benchmarks/prefill.py --device cpu --models cpu --tokens 64
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from decode_step import _DENSE, MODELS, RESULTS, _slug, relative_error

from mlacompile.testing import models
from mlacompile.testing.registration import ensure_registered
from mlacompile.testing.timing import environment, free_memory, measure

BACKENDS: dict[str, dict[str, Any]] = {
    "stock": {"backend": "inductor"},
    "mlacompile": {"backend": "mlacompile"},
}
CACHES = ("static", "none")


@dataclass
class Row:
    """One backend on one model and cache. peak_gib: the most that was allocated during a call, all of it."""

    model: str
    cache: str
    cache_length: int
    tokens: int
    backend: str
    ms: float | None = None
    peak_gib: float | None = None
    first_call_s: float | None = None
    error_vs_eager: float | None = None
    form: str | None = None
    sees: str | None = None
    error: str | None = None


def build(name: str, dtype: torch.dtype, device: str) -> Any:
    """One dense layer of that model's sizes."""
    sizes = {**_DENSE, **MODELS[name], "num_hidden_layers": 1, "first_k_dense_replace": 1}
    config = models.tiny_config("deepseek_v3", **sizes, num_key_value_heads=MODELS[name]["num_attention_heads"])
    return models.build_model(config, dtype=dtype, device=device)


def prompt(run: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Logits of the last token of a prompt on an empty cache."""
    with torch.no_grad():
        if cache is None:
            return run(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        models.set_length(cache, 0)
        return run(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits


def run_one(row: Row, model: Any, cache: Any, tokens: Tensor, eager: Tensor, args: argparse.Namespace) -> None:
    """Compile, time and weigh one backend; fills the row."""
    free_memory()
    if row.backend == "mlacompile":
        ensure_registered()
    run = torch.compile(model, **BACKENDS[row.backend])
    start = time.perf_counter()
    logits = prompt(run, cache, tokens)
    row.first_call_s = round(time.perf_counter() - start, 2)
    row.error_vs_eager = relative_error(logits, eager)
    if row.backend == "mlacompile":
        import mlacompile

        (site,) = mlacompile.last_report().sites
        row.form, row.sees = site.form, site.sees
    prompt(run, cache, tokens)
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timing = measure(
        lambda: prompt(run, cache, tokens), device=args.device, warmup=1, calls=args.calls, max_calls=50, budget_s=0.5
    )
    row.ms = timing.median
    if args.device == "cuda":
        row.peak_gib = torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    """Run what was asked for; write results after every row."""
    args = _arguments()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    about = environment() | ({"commit": args.commit} if args.commit else {})
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / f"prefill-{_slug(args.device)}.json"
    rows: list[Row] = []
    for name in args.models:
        model = build(name, dtype, args.device)
        tokens = models.random_tokens(model.config, args.batch, args.tokens, device=args.device)
        for kind in args.caches:
            length = 0 if kind == "none" else args.cache_length or args.tokens
            cache = None if kind == "none" else models.static_cache(model, args.batch, length)
            eager = prompt(model, cache, tokens)
            for backend in BACKENDS:
                row = Row(name, kind, length, args.tokens, backend)
                try:
                    run_one(row, model, cache, tokens, eager, args)
                except Exception as error:  # one that fails (out of memory, say) must not take the others with it
                    row.error = f"{type(error).__name__}: {str(error)[:300]}"
                rows.append(row)
                print(_line(row), flush=True)
                data = {"environment": about, "dtype": str(dtype).removeprefix("torch."), "batch": args.batch}
                out.write_text(json.dumps(data | {"results": [asdict(r) for r in rows]}, indent=1) + "\n")
            _compare(*rows[-2:])
            del cache
        del model
    print(out)
    sys.exit(any(row.error is not None for row in rows))


def _line(row: Row) -> str:
    head = f"{row.model:8} {row.tokens:6} tokens, cache {row.cache:6} {row.cache_length:6}  {row.backend:11}"
    if row.ms is None:
        return f"{head} failed: {row.error}"
    memory = "" if row.peak_gib is None else f"{row.peak_gib:7.2f} GiB"
    form = "" if row.form is None else f", {row.form} ({row.sees})"
    times = f"{row.ms:9.2f} ms {memory}  first call {row.first_call_s:.1f} s"
    return f"{head} {times}, error {row.error_vs_eager:.1e}{form}"


def _compare(stock: Row, ours: Row) -> None:
    if stock.ms is not None and ours.ms is not None:
        memory = ""
        if stock.peak_gib is not None and ours.peak_gib is not None:
            memory = f", {ours.peak_gib / stock.peak_gib:.2f} of the memory"
        print(f"{'':8} {stock.ms / ours.ms:.2f} × as fast as stock{memory}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--models", type=lambda text: text.split(","), default=["v3", "v2-lite"], help=", ".join(MODELS)
    )
    parser.add_argument("--caches", type=lambda text: text.split(","), default=list(CACHES), help=", ".join(CACHES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--cache-length", type=int, help="of the StaticCache (default: the prompt's)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=10, help="timed calls at least")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--commit", help="the commit to name in the results, where the tree has no git")
    args = parser.parse_args()
    for name, known in (("models", MODELS), ("caches", CACHES)):
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name} {','.join(sorted(unknown))}: expected some of {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu runs on the CPU")
    return args


if __name__ == "__main__":
    main()
