"""Times ``row_product`` and ``head_product`` on the weights of a DeepSeek layer, tile by tile, against cuBLAS.

Each product as a decode step for one sequence has it, with and without what stands around it. Weights are cold: a CUDA
graph of calls on different weights, several times any L2 in all, is replayed. Parity with float64 is checked first.

    python benchmarks/rows.py                     V3's and V2-Lite's layer, on a GPU
    python benchmarks/rows.py --tiles             every choice of tiles besides, which takes minutes to compile
    python benchmarks/rows.py --fp8               weights in FP8, still against cuBLAS in 16 bits
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.kernels.fp8_linear.launch import RowTiles
from mlacompile.kernels.head_product.launch import head_product_triton
from mlacompile.kernels.row_product.launch import Tiles, row_product_fp8, row_product_triton
from mlacompile.ops import head_product_reference, row_product_reference
from mlacompile.ops.fp8_linear import fp8_quantize_weight
from mlacompile.testing.timing import environment, replayed_us

COLD_BYTES = 400 << 20  # read by one replay
RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16
EPS = 1e-6


@dataclass(frozen=True)
class Product:
    """Weights [n, k] of one row, and what stands around them."""

    name: str
    ns: tuple[int, ...]
    k: int
    norm: bool = False
    added: bool = False
    gate: str = ""


V3 = [
    Product("q_a, kv_a", (1536, 576), 7168),
    Product("q_a, kv_a", (1536, 576), 7168, norm=True),
    Product("q_b", (24576,), 1536),
    Product("q_b", (24576,), 1536, norm=True),
    Product("o", (7168,), 16384),
    Product("o", (7168,), 16384, added=True),
    Product("gate, up", (18432, 18432), 7168),
    Product("gate, up", (18432, 18432), 7168, norm=True),
    Product("gate, up", (18432, 18432), 7168, norm=True, gate="silu"),
    Product("down", (7168,), 18432, added=True),
]
V2_LITE = [
    Product("q, kv_a", (3072, 576), 2048, norm=True),
    Product("o", (2048,), 2048, added=True),
    Product("gate, up", (10944, 10944), 2048, norm=True, gate="silu"),
    Product("down", (2048,), 10944, added=True),
]
FP8_TILES = [
    RowTiles(rows, 16, 32, warps, warps_k, unroll)
    for rows in (1, 2, 4)
    for warps, warps_k in ((1, 1), (2, 2), (4, 4), (8, 8))
    for unroll in (1, 2)
]
TILES = [Tiles(n, k, w) for n in (2, 4, 8) for k in (512, 1024, 2048) for w in (2, 4, 8) if n * k >= 2048]


@dataclass
class Row:
    """One measurement. tiles: rows, step and warps, or the fields of RowTiles; None: the default. library: the products
    alone, in 16 bits, by cuBLAS."""

    model: str
    product: str
    around: str
    tiles: tuple[int, ...] | None
    us: float
    tb_s: float
    library_us: float
    fp8: bool = False


def measure(make: Callable[[], Callable[[], Any]], size: int) -> float:
    """Microseconds a call, each on other weights."""
    return replayed_us([make() for _ in range(max(2, min(40, -(-COLD_BYTES // size))))])


def check(got: list[Tensor], want: list[Tensor], terms: int) -> None:
    """float32 sums of so many terms, rounded once to 16 bits."""
    for one, exact in zip(got, want, strict=True):
        allowed = torch.finfo(DTYPE).eps * exact.abs() + terms * 2**-24 * 8
        if not bool(((one.double() - exact).abs() <= allowed).all()):
            raise SystemExit(f"parity: off by {float((one.double() - exact).abs().max()):.1e}")


def run_rows(model: str, product: Product, tiles: list[Any], fp8: bool) -> list[Row]:
    """One product under several tiles."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(DTYPE)

    size = sum(product.ns) * product.k * (1 if fp8 else DTYPE.itemsize)
    x, norm = random(1, product.k) * product.k**0.5, random(product.k) if product.norm else None
    added = random(1, product.ns[0]) if product.added else None
    copies = max(2, min(8, -(-COLD_BYTES // size)))
    pool = [[random(n, product.k) for n in product.ns] for _ in range(copies)]
    quantized = [[fp8_quantize_weight(w) for w in weights] if fp8 else [] for weights in pool]
    qs, scales = [[[pair[i] for pair in pairs] for pairs in quantized] for i in range(2)]
    wide = [x.double(), qs[0] if fp8 else [w.double() for w in pool[0]], scales[0]]
    around_wide = [None if t is None else t.double() for t in (norm, added)]
    want = row_product_reference(*wide, *around_wide, eps=EPS, gate=product.gate)
    turn = itertools.cycle(range(copies))

    def ours(choice: Any, i: int) -> list[Tensor]:
        around: dict[str, Any] = {"norm": norm, "added": added, "eps": EPS, "gate": product.gate, "tiles": choice}
        return row_product_fp8(x, qs[i], scales[i], **around) if fp8 else row_product_triton(x, pool[i], **around)

    def library() -> Callable[[], Any]:
        weights = pool[next(turn)]
        return lambda: [x @ w.t() for w in weights]

    reached = measure(library, size)
    around = ", ".join(w for w, has in (("norm", product.norm), ("residual", product.added)) if has)
    around = ", ".join(filter(None, (around, product.gate)))
    rows = []
    for choice in tiles:
        if isinstance(choice, RowTiles) and choice.step > product.k:
            continue
        check(ours(choice, 0), want, product.k)

        def make(choice: Any = choice) -> Callable[[], Any]:
            i = next(turn)
            return lambda: ours(choice, i)

        us = measure(make, size)
        rows.append(Row(model, product.name, around, choice and astuple(choice), us, size / us / 1e6, reached, fp8))
    return rows


def run_heads(model: str, heads: int) -> list[Row]:
    """Both absorbed products of so many heads of rank 512, nope and values 128."""
    size = heads * 128 * 512 * DTYPE.itemsize
    pool = [(torch.randn(heads, 256, 512, device="cuda") / 512**0.5).to(DTYPE) for _ in range(12)]
    rows = []
    for name, k in (("q · w_uk", 128), ("out · w_uv", 512)):
        views = [up[:, :128] if k == 128 else up[:, 128:].transpose(1, 2) for up in pool]
        x = torch.randn(heads, 1, k, device="cuda").to(DTYPE)
        check([head_product_triton(x, views[0])], [head_product_reference(x.double(), views[0].double())], k)
        turn = itertools.cycle(views)

        def make(x: Tensor = x, turn: Any = turn) -> Callable[[], Any]:
            weight = next(turn)
            return lambda: head_product_triton(x, weight)

        def library(x: Tensor = x, turn: Any = turn) -> Callable[[], Any]:
            weight = next(turn)
            return lambda: torch.bmm(x, weight)

        us, reached = measure(make, size), measure(library, size)
        rows.append(Row(model, name, "", None, us, size / us / 1e6, reached))
    return rows


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true", help="every choice of tiles, not the default alone")
    parser.add_argument("--fp8", action="store_true", help="weights in FP8, with scales")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--commit", help="the commit to name in the results, where the tree has no git")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    tiles: list[Any] = [None, *((FP8_TILES if args.fp8 else TILES) if args.tiles else [])]
    rows: list[Row] = []
    for model, heads, products in (("v3", 128, V3), ("v2-lite", 16, V2_LITE)):
        for product in products:
            found = run_rows(model, product, tiles, args.fp8)
            rows += found
            best = min(found, key=lambda r: r.us)
            line = f"{model:8} {product.name:10} {found[0].around:22} {found[0].us:7.1f} µs {found[0].tb_s:5.2f} TB/s"
            print(f"{line}  cuBLAS {found[0].library_us:7.1f}  best {best.us:7.1f} {best.tiles or ''}", flush=True)
        for row in [] if args.fp8 else run_heads(model, heads):
            rows.append(row)
            line = f"{model:8} {row.product:10} {'':22} {row.us:7.1f} µs {row.tb_s:5.2f} TB/s"
            print(f"{line}  cuBLAS {row.library_us:7.1f}", flush=True)
    about = environment() | ({"commit": args.commit} if args.commit else {})
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / f"rows-{'fp8-' * args.fp8}{'-'.join(torch.cuda.get_device_name().lower().split())}.json"
    out.write_text(json.dumps({"environment": about, "results": [asdict(r) for r in rows]}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    with torch.no_grad():
        main()
    sys.stdout.flush()
