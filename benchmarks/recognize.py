"""What recognizing and validating costs: seconds, and the share of a model's whole compilation.

    python benchmarks/recognize.py [--layers 61] [--only tiny,v3,tiny-compiled] [--out benchmarks/results]

tiny            V3's layers and heads, ranks and widths tiny, weights on the meta device: traced, rewritten, not lowered
v3              the same with V3's own ranks and widths, which the probe and the check then have too
tiny-compiled   tiny with weights, compiled to the end by Inductor for the CPU, which is what a user waits for

Without lowering the share is of tracing and passes alone, so it is the upper end of what any backend behind would show.
MLPs are dense and narrow: experts would only lengthen the rest of a compilation.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mlacompile import Report, backend, explain, last_report
from mlacompile.testing import models
from mlacompile.testing.timing import environment

RESULTS = Path(__file__).parent / "results"
#: Stages that find sites and check rewrites; what is left of a compilation is tracing, rewriting and lowering.
STAGES = ("canonicalize", "recognize", "validate")
CONTEXT = 64

_TINY = {
    "hidden_size": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_V3 = {
    "hidden_size": 7168,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
CASES: dict[str, tuple[dict[str, int], str]] = {
    "tiny": (_TINY, "meta"),
    "v3": (_V3, "meta"),
    "tiny-compiled": (_TINY, "cpu"),
}


@dataclass(frozen=True)
class Row:
    """Seconds of one compilation. share: of it that went into STAGES, in percent."""

    case: str
    layers: int
    absorbed: int
    compile_s: float
    canonicalize_s: float
    recognize_s: float
    validate_s: float
    share: float


def main() -> int:
    """Measure, print, write; 1 when a share is 10 % or more."""
    args = _arguments()
    rows = []
    for case in args.only.split(","):
        rows.append(run(case, args.layers))
        print(_line(rows[-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = environment() | ({"commit": args.commit} if args.commit else {})
    found = {"environment": about, "results": [asdict(row) for row in rows]}
    (args.out / "recognize-cpu.json").write_text(json.dumps(found, indent=2) + "\n")
    return int(any(row.share >= 10 for row in rows))


def run(case: str, layers: int) -> Row:
    """One decode step of a model of ``layers`` layers, compiled."""
    sizes, device = CASES[case]
    heads = {"num_attention_heads": 128, "num_key_value_heads": 128}
    depth = {"num_hidden_layers": layers, "first_k_dense_replace": layers, "intermediate_size": 64}
    model = models.build_model(models.tiny_config("deepseek_v3", **heads, **depth, **sizes), device=device)
    cache = models.static_cache(model, 1, CONTEXT, length=5 if device == "cpu" else 0)
    tokens = models.random_tokens(model.config, 1, 1, device=device)
    torch._dynamo.reset()
    begin = time.perf_counter()
    report = _compile(model, device, input_ids=tokens, past_key_values=cache)
    spent = time.perf_counter() - begin
    found, known, checked = (report.seconds.get(stage, 0.0) for stage in STAGES)
    return Row(case, layers, report.absorbed, spent, found, known, checked, 100 * (found + known + checked) / spent)


def _compile(model: Any, device: str, **inputs: Any) -> Report:
    if device == "meta":
        return explain(model, **inputs)
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    return last_report()


def _line(row: Row) -> str:
    stages = f"canonicalize {row.canonicalize_s:.2f}, recognize {row.recognize_s:.2f}, validate {row.validate_s:.2f} s"
    return (
        f"{row.case:14} {row.layers} layers, {row.absorbed} absorbed: {stages}; "
        f"{row.share:.1f} % of a compilation of {row.compile_s:.1f} s"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--only", default=",".join(CASES), help=f"of {', '.join(CASES)}, with commas between")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--commit", help="the commit to name in the results, where the tree has no git")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - CASES.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {', '.join(CASES)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
