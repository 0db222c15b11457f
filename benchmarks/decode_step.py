"""One decode step of whole DeepSeek-shaped models under eager, stock torch.compile and mlacompile, compared in one run.

Two layers with dense MLPs, random weights, a vocabulary of 1024 (so that the figure is the layers', not the head's), a
StaticCache exactly as long as the context and full of random latents; the step writes the last position. The logits are
held against the same step in a higher precision (float32 for bf16, float64 for float32), batch rows in chunks: the
error that eager itself makes there is the yardstick, and a backend fails parity beyond twice that. A model in FP8 has a
reference of its own, with the weights and the cache that it has. docs/benchmarks.md says more.

    python benchmarks/decode_step.py                       the whole table, on a GPU
    python benchmarks/decode_step.py --shapes 64x8192 --models v3 --backends default,mlacompile
    python benchmarks/decode_step.py --device cpu          the CPU configuration
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.testing import models
from mlacompile.testing.registration import ensure_registered
from mlacompile.testing.timing import Timing, environment, free_memory, measure

LAYERS = 2
VOCAB = 1024
ROWS_AT_ONCE_TOKENS = 32768  # cached tokens that the run in higher precision expands at a time
RESULTS = Path(__file__).parent / "results"
_DENSE = {"num_hidden_layers": LAYERS, "first_k_dense_replace": LAYERS, "vocab_size": VOCAB}
_DENSE |= {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_DENSE |= {"max_position_embeddings": 1 << 17}

#: Sizes as published for V3 and V2-Lite; "cpu" is what two cores can still run under stock torch.compile.
MODELS: dict[str, dict[str, Any]] = {
    "v3": {"num_attention_heads": 128, "hidden_size": 7168, "q_lora_rank": 1536, "intermediate_size": 18432},
    "v2-lite": {"num_attention_heads": 16, "hidden_size": 2048, "q_lora_rank": None, "intermediate_size": 10944},
    "cpu": {"num_attention_heads": 16, "hidden_size": 1024, "q_lora_rank": None, "intermediate_size": 2816},
}
#: What is handed to torch.compile; None is eager.
BACKENDS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "default": {"backend": "inductor"},
    "reduce-overhead": {"backend": "inductor", "mode": "reduce-overhead"},
    "mlacompile": {"backend": "mlacompile"},
    "mlacompile-nographs": {"backend": "mlacompile", "options": {"cudagraphs": False}},
    "mlacompile-fp8-weights": {"backend": "mlacompile", "options": {"fp8": "all"}},
    "mlacompile-fp8": {"backend": "mlacompile", "options": {"fp8": "all"}},
    "mlacompile-fp8-token": {"backend": "mlacompile", "options": {"fp8": "all"}},
}
#: Backends that run a copy of the model whose linear layers are in FP8 alone, and the scales of the FP8 LatentCache
#: that they read, or None where they read the cache as it is.
QUANTIZED = {"mlacompile-fp8-weights": None, "mlacompile-fp8": "block", "mlacompile-fp8-token": "token"}
#: How far from the eager run of the same quantized model, on the same cache, such a backend may be.
FP8_LIMIT = 2e-2
DEFAULTS = {
    "cuda": ("v3,v2-lite", "1x1024,1x8192,16x8192,64x8192", "eager,default,reduce-overhead,mlacompile"),
    "cpu": ("cpu", "1x4096", "eager,default,mlacompile"),
}


@dataclass
class Row:
    """One backend at one model and shape; ``error`` says why there is no figure, if there is none."""

    model: str
    heads: int
    batch: int
    context: int
    backend: str
    ms_per_layer: float | None = None
    step: Timing | None = None
    host_ms: float | None = None  # what the host alone takes for a step, on CUDA: its work when nothing is queued
    replays: int | None = None  # of CUDA graphs in a step
    first_call_s: float | None = None
    peak_gib: float | None = None
    weights_gib: float | None = None
    cache_gib: float | None = None
    error_vs_reference: float | None = None
    error_vs_eager: float | None = None
    eager_vs_reference: float | None = None
    parity: bool | None = None
    absorbed: int | None = None
    error: str | None = None


def main() -> None:
    """Run what was asked for; write results after every row, so that a run cut short still says something."""
    args = _arguments()
    out: Path = args.out / f"decode_step-{_slug(args.device)}.json"
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    about = environment() | ({"commit": args.commit} if args.commit else {})
    settings = {
        "layers": LAYERS,
        "vocabulary": VOCAB,
        "dtype": str(dtype).removeprefix("torch."),
        "cache": "StaticCache",
    }
    rows: list[Row] = []
    torch.backends.cuda.matmul.allow_tf32 = False
    earlier = _earlier(out, about)
    for name in args.models.split(","):
        model = build(name, dtype, args.device)
        for shape in args.shapes.split(","):
            batch, context = map(int, shape.split("x"))
            for row in run_shape(name, model, batch, context, args):
                rows.append(row)
                print(_line(row), flush=True)
                save(out, about, settings, earlier, rows)
        del model
    if not args.no_plot:
        from decode_plot import plot

        plot(out, out.with_suffix(".png"))
    print(f"{out}")
    sys.exit(any(row.error or row.parity is False for row in rows))


def build(name: str, dtype: torch.dtype, device: str) -> Any:
    """A dense-MLP DeepSeek-V3 of that size with random weights, its queries scaled so that attention is not flat.

    With the usual initialisation all scores are nearly equal, attention averages noise away and a wrong attention would
    hardly show in the logits.
    """
    heads = MODELS[name]["num_attention_heads"]
    config = models.tiny_config("deepseek_v3", **_DENSE, **MODELS[name], num_key_value_heads=heads)
    model: Any = models.build_model(config, dtype=dtype, device=device)
    with torch.no_grad():
        for layer in model.model.layers:
            queries = layer.self_attn.q_b_proj or layer.self_attn.q_proj
            queries.weight.mul_(8.0)
    return model


def run_shape(name: str, model: Any, batch: int, context: int, args: argparse.Namespace) -> list[Row]:
    """All backends at one shape. Eager always runs once, to be compared with."""
    free_memory()
    cache = models.static_cache(model, batch, context, random=True)
    tokens = models.random_tokens(model.config, batch, 1, device=args.device)
    reference = None if args.no_reference else reference_logits(model, cache, tokens, context)
    eager = decode(model, cache, tokens, context).clone()
    own_error = None if reference is None else relative_error(eager, reference)
    limit = None if own_error is None else max(2 * own_error, 1e-6)
    rows = []
    for backend in args.backends.split(","):
        row = Row(name, MODELS[name]["num_attention_heads"], batch, context, backend)
        try:
            own, held, exact = model, cache, reference
            beside: Tensor | None = eager
            row.eager_vs_reference = own_error
            if backend in QUANTIZED:
                own, held = in_fp8(model, cache, QUANTIZED[backend])
                beside = None
                if reference is not None:
                    beside = decode(own, held, tokens, context).clone()
                    exact = reference_logits(model, held, tokens, context, own)
                    row.eager_vs_reference = relative_error(beside, exact)
            row.weights_gib, row.cache_gib = sizes(own, held)
            logits = run_backend(row, own, held, tokens, args)
            row.error_vs_eager = None if beside is None else relative_error(logits, beside)
            if exact is not None and limit is not None:
                row.error_vs_reference = relative_error(logits, exact)
                row.parity = row.error_vs_reference <= limit
            if backend in QUANTIZED:
                # FP8 itself costs more than rounding in the dtype of the model, and an eager run expands the cache by
                # products that quantize it: that is exact only where it was in FP8 before.
                row.parity = None
                if QUANTIZED[backend] and row.error_vs_eager is not None:
                    row.parity = row.error_vs_eager <= FP8_LIMIT
            del own, held, exact
        except Exception as error:  # one backend that fails (out of memory, say) must not take the others with it
            row.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
        rows.append(row)
    return rows


def in_fp8(model: Any, cache: Any, scales: str | None) -> tuple[Any, Any]:
    """A copy of the model in FP8, its own weights released, and the same tokens, in an FP8 cache unless ``scales`` is
    None."""
    import mlacompile

    copied = copy.deepcopy(model)
    mlacompile.quantize(copied)
    if scales is None:
        return copied, cache
    length = cache.layers[0].keys.shape[-2]
    latents = mlacompile.LatentCache(model.config, max_cache_len=length, dtype="fp8_e4m3", scales=scales)
    for new, old in zip(latents.layers, cache.layers, strict=True):
        batch = old.keys.shape[0]
        new.initialize(batch, old.keys.dtype, old.keys.device)
        slots = torch.arange(length, device=old.keys.device)
        new.store.write(slots, old.keys.squeeze(1), old.values.squeeze(1))
    return copied, latents


def sizes(model: Any, cache: Any) -> tuple[float, float]:
    """GiB of the parameters of a model, and of what a cache keeps of tokens."""
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    kept = [
        x
        for layer in cache.layers
        for x in (layer.store.arrays().values() if hasattr(layer, "store") else (layer.keys, layer.values))
    ]
    return weights / 2**30, sum(x.numel() * x.itemsize for x in kept) / 2**30


def run_backend(row: Row, model: Any, cache: Any, tokens: Tensor, args: argparse.Namespace) -> Tensor:
    """Compile, check nothing is left of the last backend, time; fills the row and returns the logits."""
    free_memory()
    how = BACKENDS[row.backend]
    if row.backend.startswith("mlacompile"):
        ensure_registered()
    run = model if how is None else torch.compile(model, **how)
    start = time.perf_counter()
    logits = decode(run, cache, tokens, row.context).clone()
    row.first_call_s = round(time.perf_counter() - start, 2)
    for _ in range(3):  # CUDA graphs are recorded on the second and third call
        decode(run, cache, tokens, row.context)
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row.step = measure(
        lambda: decode(run, cache, tokens, row.context), device=args.device, warmup=2, calls=args.calls, budget_s=1.0
    )
    row.ms_per_layer = row.step.median / LAYERS
    if args.device == "cuda":
        row.host_ms = host_time(lambda: decode(run, cache, tokens, row.context))
        row.replays = graph_launches(lambda: decode(run, cache, tokens, row.context))
        row.peak_gib = torch.cuda.max_memory_reserved() / 2**30
    if row.backend.startswith("mlacompile"):
        import mlacompile

        report = mlacompile.last_report()
        row.absorbed = report.absorbed
        if not report.absorbed:  # a figure of what stock torch.compile does anyway
            raise RuntimeError(f"nothing was absorbed: {[site.reason for site in report.sites]}")
        logits = decode(run, cache, tokens, row.context).clone()  # what the replayed graph says, not the first call
    return logits


def host_time(step: Callable[[], Any], calls: int = 100) -> float:
    """Milliseconds until a step has been launched, each on an idle device: the median. Where that is more than the
    device needs, the host is what the step's time says."""
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


def graph_launches(step: Callable[[], Any]) -> int:
    """How many CUDA graphs a step launches: without any, every kernel costs the host its launch."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.name == "cudaGraphLaunch" for event in profile.events())


def decode(run: Any, cache: Any, tokens: Tensor, context: int) -> Tensor:
    """One step that writes the last position of the cache: logits [B, 1, vocabulary]."""
    models.set_length(cache, context - 1)
    with torch.no_grad():
        return run(input_ids=tokens, past_key_values=cache).logits


def reference_logits(model: Any, cache: Any, tokens: Tensor, context: int, quantized: Any = None) -> Tensor:
    """The same step, untouched model, next higher precision, a few batch rows at a time.

    quantized: a copy of the model whose weights count instead, as exactly as they say; so does what the cache holds.
    """
    dtype = torch.float64 if model.dtype == torch.float32 else torch.float32
    exact = copy.deepcopy(model).to(dtype)
    if quantized is not None:
        take_weights(exact, quantized)
    rows_at_once = max(1, ROWS_AT_ONCE_TOKENS // context)
    found = []
    for start in range(0, tokens.shape[0], rows_at_once):
        part = slice(start, start + rows_at_once)
        small = models.static_cache(exact, tokens[part].shape[0], context)
        for layer, full in zip(small.layers, cache.layers, strict=True):
            keys, values = held_by(full, part, dtype)
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        found.append(decode(exact, small, tokens[part], context))
    return torch.cat(found)


def take_weights(exact: Any, quantized: Any) -> None:
    """Give ``exact`` the weights of the quantized layers, in its own dtype."""
    from mlacompile.ops.fp8_linear import fp8_dequantize_weight
    from mlacompile.resident import QuantizedLinear

    for path, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = exact.get_submodule(path).weight
            weight.data = fp8_dequantize_weight(module.weight, module.weight_scale_inv, weight.dtype)


def held_by(layer: Any, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of some rows of the batch, in ``dtype``, rounded no further than the cache does."""
    if not hasattr(layer, "store"):
        return layer.keys[rows], layer.values[rows]
    store = copy.copy(layer.store)
    store.compute = dtype
    store.rebatch(lambda x: x[rows])
    c_kv, k_pe = store.read()
    return c_kv.unsqueeze(1), k_pe.unsqueeze(1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a fraction of the largest expected logit."""
    expected = expected.double()
    return float((got.double() - expected).abs().max() / expected.abs().max())


def save(out: Path, about: dict[str, Any], settings: dict[str, Any], earlier: list[Any], rows: list[Row]) -> None:
    """Write everything measured so far; a row measured again replaces the earlier one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    by_key = {_key(row): row for row in (*earlier, *map(asdict, rows))}
    results = sorted(by_key.values(), key=_order)
    out.write_text(json.dumps({"environment": about, "settings": settings, "results": results}, indent=1) + "\n")


def _earlier(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run that came from the same place, so that a table can be measured in parts."""
    if not out.is_file():
        return []
    found = json.loads(out.read_text())
    return found["results"] if found["environment"] == about else []


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["batch"], row["context"], row["backend"]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return list(MODELS).index(row["model"]), row["batch"], row["context"], list(BACKENDS).index(row["backend"])


def _line(row: Row) -> str:
    head = f"{row.model:8} {row.batch:3} × {row.context:<6} {row.backend:20}"
    if row.error or row.step is None:
        return f"{head} failed: {row.error}"
    errors = "logits not compared" if row.error_vs_eager is None else f"logits {row.error_vs_eager:.1e} from eager"
    if row.error_vs_reference is not None:
        own = f" (eager {row.eager_vs_reference:.1e})"
        errors += f", {row.error_vs_reference:.1e} from reference{own}{'  PARITY FAILS' if row.parity is False else ''}"
    memory = "" if row.peak_gib is None else f"{row.peak_gib:7.1f} GiB"
    memory += f" (weights {row.weights_gib:.2f}, cache {row.cache_gib:.3f})" if row.weights_gib is not None else ""
    absorbed = "" if row.absorbed is None else f", {row.absorbed} absorbed"
    times = f"{row.ms_per_layer:9.3f} ms/layer (p10 {row.step.p10:.2f}, p90 {row.step.p90:.2f} ms/step"
    times += ")" if row.host_ms is None else f", host {row.host_ms:.2f}, {row.replays} graphs)"
    return f"{head} {times} {memory}  first call {row.first_call_s:5.1f} s, {errors}{absorbed}"


def _slug(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return "-".join(name.lower().split())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--shapes", help="batch x context, with commas between: 1x1024,64x8192")
    parser.add_argument("--backends", help=f"of {', '.join(BACKENDS)}")
    parser.add_argument("--calls", type=int, default=20, help="timed steps at least (default 20)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    parser.add_argument("--commit", help="the commit to name in the results, where the tree has no git")
    parser.add_argument("--no-reference", action="store_true", help="skip the run in higher precision")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args()
    for name, default in zip(("models", "shapes", "backends"), DEFAULTS[args.device], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name, known in (("models", MODELS), ("backends", BACKENDS)):
        if unknown := set(getattr(args, name).split(",")) - known.keys():
            parser.error(f"--{name} {','.join(sorted(unknown))}: expected some of {', '.join(known)}")
    if not all(len(part) == 2 and all(n.isdigit() for n in part) for part in map(_split, args.shapes.split(","))):
        parser.error(f"--shapes {args.shapes}: expected batch x context pairs such as 1x1024,64x8192")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu runs the CPU configuration")
    return args


def _split(shape: str) -> list[str]:
    return shape.split("x")


if __name__ == "__main__":
    main()
