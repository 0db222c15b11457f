"""Times products with FP8 weights on a GPU against 16 bits and cuBLASLt: cold weights, CUDA graphs, parity first.

    python benchmarks/fp8_linear.py                             every kernel that can serve, over the table of shapes
    python benchmarks/fp8_linear.py --rows 1,16 --shapes 2112x7168,128*512x128
    python benchmarks/fp8_linear.py --rows 128 --shapes 2112x7168 --also hopper:128x128x7,triton:128x128x8x4x7

A shape is N x K, or heads*N x K with a weight for every head. Every call of a replay reads another copy of the weight,
so that none is found in L2. Kernels get x as they want it: ``weight only`` in bf16, the others quantized beforehand;
what quantizing takes is timed by itself, together with the residual and the norm that stand before it. ``chosen`` is
what the compiled model takes; a row fails where that is slower than 1.1 times the better of bf16 and cuBLASLt, or where
parity does not hold.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels import registry
from mlacompile.lowering.select import slower_in_fp8
from mlacompile.ops.fp8_linear import WEIGHT_ONLY_ROWS, fp8_quantize_weight
from mlacompile.ops.fp8_quantize import fp8_quantize, fp8_quantize_reference
from mlacompile.ops.quantize_rows import quantize_rows
from mlacompile.testing.scaled import E4M3, Product, exact, values, worst
from mlacompile.testing.timing import environment, replayed_us

RESULTS = Path(__file__).parent / "results"
COLD_BYTES = 256 << 20  # one replay reads at least this much, several times any L2
CALLS = 20  # at least so many a replay, whose launch takes as long as a small call
LIMIT = 1.1  # of chosen over the better of PEERS
PEERS = ("bf16", "cublas")
#: Of --also: how a kernel whose tiles can be named runs, module and function, and what its numbers make.
TILED = {
    "hopper": ("mlacompile.kernels.fp8_linear.hopper_launch", "fp8_linear_hopper", "HopperTiles"),
    "stream": ("mlacompile.kernels.fp8_linear.stream_launch", "fp8_linear_stream", "StreamTiles"),
    "triton": ("mlacompile.kernels.fp8_linear.launch", "fp8_linear_tiles", "Tiles"),
}
SHAPES = "24576x1536,7168x16384,2112x7168,32768x512,36864x7168,7168x18432,128*512x128,128*128x512"
ROWS = "1,2,4,8,16,32,64,128,512,4096"


@dataclass(frozen=True)
class Shape:
    n: int
    k: int
    heads: int = 0

    @classmethod
    def parse(cls, text: str) -> Shape:
        heads, _, matrix = text.rpartition("*")
        n, k = map(int, matrix.split("x"))
        return cls(n, k, int(heads or 0))

    def __str__(self) -> str:
        return f"{self.heads}*{self.n}x{self.k}" if self.heads else f"{self.n}x{self.k}"

    @property
    def elements(self) -> int:
        return max(self.heads, 1) * self.n * self.k


def turns(calls: list[Callable[[], Any]], count: int) -> list[Callable[[], Any]]:
    """So many calls, by turns."""
    return list(itertools.islice(itertools.cycle(calls), count))


def with_tiles(text: str) -> registry.Kernel:
    """A kernel with tiles of its own, from ``hopper:256x128x1`` or ``triton:128x64x4x5x4``, the fields of its tiles."""
    name, _, numbers = text.partition(":")
    module, function, kind = TILED[name]
    source = importlib.import_module(module)
    tiles = getattr(source, kind)(*map(int, numbers.split("x")))
    run = functools.partial(getattr(source, function), tiles=tiles)
    return registry.Kernel(text, "fp8_linear", registry.find("fp8_linear", name).supports, run)


def measure(
    shape: Shape, rows: int, quantized_weight: tuple[Tensor, Tensor], also: Sequence[registry.Kernel] = ()
) -> dict[str, Any]:
    """One row of the table."""
    found: dict[str, Any] = {"rows": rows, "shape": str(shape), "us": {}, "errors": {}, "wrong": {}}
    copies = max(2, -(-COLD_BYTES // shape.elements))
    count = max(copies, CALLS) if rows <= 512 else 4
    x = values((*([shape.heads] if shape.heads else []), rows, shape.k), "outliers", "cuda", seed=1).bfloat16()
    products = {False: Product(x, None, *quantized_weight)}
    if not shape.heads:
        q, descale = fp8_quantize(x, SCALE_GROUP, E4M3)
        products[True] = Product(q, descale, *quantized_weight)
    weights = [(torch.empty_like(p.weight), p.weight_descale.clone()) for p in [products[False]] * copies]
    for weight, _ in weights:
        weight.view(torch.uint8).random_(0, 0x7F)
    wide = [w.to(torch.bfloat16) for w, _ in weights[: max(2, copies // 2)]]
    found["us"]["bf16"] = replayed_us(turns([_matmul(x, w) for w in wide], count))
    chosen = None
    for kernel in (*registry.kernels("fp8_linear"), *also):
        for quantized, product in products.items():
            if kernel.supports(*product.tensors, torch.bfloat16) or (kernel.name == "gluon" and quantized):
                continue
            name = kernel.name if quantized else f"{kernel.name}, weight only"
            got = kernel.run(*product.tensors, torch.bfloat16)
            want, bound = exact(product, torch.bfloat16)
            found["errors"][name] = float((got.double() - want).norm() / want.norm())
            if wrong := worst(got, want, bound):
                found["wrong"][name] = wrong
            del want, bound, got
            found["us"][name] = replayed_us(turns([_call(kernel, product, w) for w in weights], count))
    keeps = bool(shape.heads) or rows <= WEIGHT_ONLY_ROWS
    best, _ = registry.best("fp8_linear", *products[not keeps].tensors, torch.bfloat16)
    if best is not None:
        chosen = f"{best.name}, weight only" if keeps else best.name
    found["refused"] = slower_in_fp8(x, wide[0])
    found["chosen"] = "bf16" if found["refused"] else chosen
    found["over_peers"] = found["us"][found["chosen"]] / min(us for name, us in found["us"].items() if name in PEERS)
    return found


def _matmul(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: x @ weight.transpose(-1, -2)


def _call(kernel: registry.Kernel, product: Product, weight: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: kernel.run(product.x, product.x_descale, *weight, torch.bfloat16)


def quantizing(rows: int, k: int) -> dict[str, Any]:
    """What a residual, a norm and the quantization take: by Inductor, with how many kernels, and by quantize_rows."""
    from torch._inductor.utils import run_and_get_code

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def normed(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fp8_quantize_reference(norm(x, weight), SCALE_GROUP, E4M3)

    def summed(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = x + added
        return (*fp8_quantize_reference(norm(total, weight), SCALE_GROUP, E4M3), total)

    x, added, weight = (torch.randn(n, k, device="cuda").bfloat16() for n in (rows, rows, 1))
    found: dict[str, Any] = {"rows": rows, "width": k}
    for name, function in (
        ("norm", lambda x, added, weight: norm(x, weight)),
        ("norm and quantize", normed),
        ("sum, norm and quantize", summed),
    ):
        compiled: Any = torch.compile(function)
        _, code = run_and_get_code(compiled, x, added, weight[0])
        us = replayed_us([functools.partial(compiled, x, added, weight[0])] * CALLS)
        found[name] = {"kernels": "".join(code).count("@triton.jit"), "us": us}
    for name, before in (("norm and quantize", None), ("sum, norm and quantize", added)):
        call = functools.partial(quantize_rows, x, before, weight[0], eps=1e-6, impl="triton")
        found[name]["quantize_rows"] = replayed_us([call] * CALLS)
    return found


def main() -> None:
    """Measure, print, write; exit with 1 where a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=ROWS, help=f"of activations, with commas between (default {ROWS})")
    parser.add_argument("--shapes", default=SHAPES, help="N x K or heads*N x K, with commas between")
    parser.add_argument("--also", help="kernels with tiles of their own, as hopper:256x128x1, with commas between")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--commit", help="the commit to name in the results, where the tree has no git")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    also = [with_tiles(text) for text in args.also.split(",")] if args.also else []
    about = environment() | ({"commit": args.commit} if args.commit else {})
    out = args.out / f"fp8_linear-{'-'.join(about['device'].lower().split())}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    fused: list[dict[str, Any]] = []
    for shape in map(Shape.parse, args.shapes.split(",")):
        size = (*([shape.heads] if shape.heads else []), shape.n, shape.k)
        weight = fp8_quantize_weight(values(size, "outliers", "cuda", seed=0) * shape.k**-0.5)
        for rows in map(int, args.rows.split(",")):
            if shape.heads and rows > 128:
                continue
            results.append(measure(shape, rows, weight, also))
            print(_line(results[-1]), flush=True)
            out.write_text(json.dumps({"environment": about, "results": results, "quantizing": fused}, indent=1) + "\n")
    for rows in (64, 4096):
        fused.append(quantizing(rows, 7168))
        print(fused[-1], flush=True)
    out.write_text(json.dumps({"environment": about, "results": results, "quantizing": fused}, indent=1) + "\n")
    print(out)
    sys.exit(any(row["wrong"] or row["over_peers"] > LIMIT for row in results))


def _line(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
    wrong = "".join(f"  WRONG {name}: {text}" for name, text in row["wrong"].items())
    slow = f"  SLOWER ({row['over_peers']:.2f})" if row["over_peers"] > LIMIT else ""
    return f"{row['rows']:5} × {row['shape']:14} {times}  chosen: {row['chosen']}{slow}{wrong}"


if __name__ == "__main__":
    main()
