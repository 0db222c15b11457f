"""Times ``mla_decode`` on a GPU: cold L2, CUDA-graph replay, parity checked in the same run.

    python benchmarks/mla_decode.py --out results.json              the chosen plans, over the table of shapes
    python benchmarks/mla_decode.py --variants tma-wide,tma,ptr     given tiles, splits as chosen
    python benchmarks/mla_decode.py --sweep --out sweep.json        tiles and splits over a few shapes

Every call of a replay reads another slice of one large pool, so that no cache is found in L2. ``share`` is the time of
the larger floor, bytes over --bandwidth or FLOPs over --flops, in the time measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.kernels.mla_decode.launch import device_of, mla_decode_portable, shape_of
from mlacompile.kernels.mla_decode.plan import Plan, choose_plan, choose_splits, shared_memory
from mlacompile.ops import mla_decode_reference

RANK, ROPE = 512, 64
SCALE = 192**-0.5
COLD_BYTES = 256 << 20  # one replay reads at least this much, several times any L2


@dataclass(frozen=True)
class Row:
    heads: int
    batch: int
    context: int
    queries: int = 1

    @property
    def bytes(self) -> int:
        """Read once, written once: cache, queries, outputs."""
        rows = self.batch * self.heads * self.queries
        return 2 * (self.batch * self.context * (RANK + ROPE) + rows * (2 * RANK + ROPE))

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.heads * self.queries * self.context * (2 * RANK + ROPE)


TABLE = [
    *(Row(16, b, t) for b, t in ((1, 1024), (1, 8192), (1, 32768), (16, 8192), (64, 8192), (128, 4096))),
    *(Row(16, b, t) for b, t in ((128, 8192), (128, 32768))),
    *(Row(64, b, 8192) for b in (1, 64, 128)),
    *(Row(128, b, t) for b, t in ((1, 1024), (1, 8192), (1, 32768), (16, 8192), (64, 4096), (64, 8192))),
    *(Row(128, b, t) for b, t in ((128, 8192), (128, 32768))),
    *(Row(128, 64, 8192, 2), Row(16, 64, 8192, 4)),
]
SWEEP = [
    *(Row(16, b, t) for b, t in ((1, 1024), (1, 8192), (1, 32768), (16, 8192), (64, 8192), (128, 8192))),
    *(Row(128, b, t) for b, t in ((1, 1024), (1, 8192), (16, 8192), (64, 8192))),
]
TILES = {
    "tma-wide": Plan(64, 64, 8, 2, tma=True, wide=True),
    "tma": Plan(64, 64, 8, 2, tma=True),
    "ptr-wide": Plan(64, 64, 8, 2, wide=True),
    "ptr": Plan(64, 64, 8, 2),
    "tma-wide-n32s4": Plan(64, 32, 8, 4, tma=True, wide=True),
    "tma-wide-n32s3": Plan(64, 32, 8, 3, tma=True, wide=True),
    "tma-n32s4": Plan(64, 32, 8, 4, tma=True),
    "tma-n32s3": Plan(64, 32, 8, 3, tma=True),
    "ptr-wide-n32s4": Plan(64, 32, 8, 4, wide=True),
    "h32n32s4": Plan(32, 32, 8, 4),
    "h16n64s3": Plan(16, 64, 4, 3),
    "h16n32s4": Plan(16, 32, 4, 4),
    "h16n32s3": Plan(16, 32, 4, 3),
    "h16n64s3w8": Plan(16, 64, 8, 3),
}


class Pool:
    """One large buffer of random bf16 latents, of which every call takes another slice."""

    def __init__(self, elements: int) -> None:
        self.data = torch.empty(elements, dtype=torch.bfloat16, device="cuda")
        for chunk in self.data.split(1 << 28):
            chunk.normal_()

    def caches(self, row: Row, fused: bool) -> list[tuple[Tensor, Tensor]]:
        """Disjoint (c_kv, k_pe) of that size, enough of them that a cycle outgrows L2."""
        tokens = row.batch * row.context
        count = max(1, min(-(-COLD_BYTES // row.bytes), self.data.numel() // (tokens * (RANK + ROPE))))
        result = []
        for flat in self.data[: count * tokens * (RANK + ROPE)].view(count, -1):
            if fused:
                cache = flat.view(row.batch, row.context, RANK + ROPE)
                result.append((cache[..., :RANK], cache[..., RANK:]))
            else:
                c_kv, k_pe = flat.split([tokens * RANK, tokens * ROPE])
                result.append((c_kv.view(row.batch, -1, RANK), k_pe.view(row.batch, -1, ROPE)))
        return result


def queries(row: Row) -> tuple[Tensor, Tensor]:
    gen = torch.Generator("cuda").manual_seed(0)
    made = torch.randn(row.batch, row.queries, row.heads, RANK + ROPE, device="cuda", generator=gen).bfloat16()
    q_latent, q_pe = made.transpose(1, 2).split([RANK, ROPE], dim=-1)
    return q_latent, q_pe


def time_replay(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median microseconds a call, all calls captured one after another into one graph."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def error(row: Row, q: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], length: Tensor, out: Tensor) -> float:
    """Relative error in norm against float32, on up to three batch rows."""
    picked = torch.tensor(sorted({0, row.batch // 2, row.batch - 1}), device="cuda")
    q_latent, q_pe, c_kv, k_pe = (x[picked].float() for x in (*q, *cache))
    causal = row.queries > 1
    want, _ = mla_decode_reference(q_latent, q_pe, c_kv, k_pe, None, None, length[picked], scale=SCALE, causal=causal)
    return float((out[picked].float() - want).norm() / want.norm())


def measure(row: Row, plan: Plan, pool: Pool, *, fused: bool, repeats: int, name: str) -> dict[str, Any]:
    """Time and error of one plan on one shape, as a record for the table and the file."""
    q, caches = queries(row), pool.caches(row, fused)
    length = torch.full((row.batch,), row.context, dtype=torch.int32, device="cuda")
    keywords: dict[str, Any] = {"scale": SCALE, "causal": row.queries > 1, "plan": plan}

    def call(cache: tuple[Tensor, Tensor]) -> Tensor:
        return mla_decode_portable(*q, *cache, None, None, length, **keywords)[0]

    wrong = error(row, q, caches[0], length, call(caches[0]))
    microseconds = time_replay([partial(call, cache) for cache in caches], repeats)
    return {**asdict(row), "name": name, "plan": str(plan), "us": microseconds, "error": wrong}


def chosen(row: Row, tiles: Plan | None) -> Plan:
    """The plan the op would take, or given tiles with the number of splits it would take."""
    meta = torch.empty(0, dtype=torch.bfloat16, device="meta")
    cache = (meta.new_empty(row.batch, row.context, RANK), meta.new_empty(row.batch, row.context, ROPE))
    q = (
        meta.new_empty(row.batch, row.heads, row.queries, RANK),
        meta.new_empty(row.batch, row.heads, row.queries, ROPE),
    )
    shape, device = shape_of(*q, *cache, None), device_of(torch.device("cuda", torch.cuda.current_device()))
    if tiles is None:
        return choose_plan(shape, device)
    if shared_memory(tiles, shape) > device.smem:
        raise ValueError(f"{tiles} needs {shared_memory(tiles, shape)} bytes of shared memory, there are {device.smem}")
    return replace(tiles, splits=choose_splits(tiles, shape, device), pdl=device.capability >= (9, 0))


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, Row, Plan]]:
    if arguments.sweep:
        for row, (name, tiles) in product(SWEEP, TILES.items()):
            if tiles.block_h < 64 and row.heads > 16 and row.batch > 1:
                continue  # would read the cache once for every few heads
            base = chosen(row, tiles)
            fill = {1, 2, 4, 8} if row.batch > 1 else {4, 8, 16, 32, 64}
            for splits in sorted(
                s for s in fill | {base.splits} if s * tiles.block_n <= row.context and s * row.batch <= 512
            ):
                yield name, row, replace(base, splits=splits, pdl=base.pdl)
        for row in SWEEP[:2]:
            yield "no-pdl", row, replace(chosen(row, None), pdl=False)
        return
    for row, name in product(TABLE, arguments.variants.split(",")):
        yield name, row, chosen(row, None if name == "auto" else TILES[name])


def compile_one(plan: Plan, heads: int, causal: bool, fused: bool) -> None:
    """Run a plan once on a small cache, in a worker: its binaries go to Triton's cache on disk."""
    row = Row(heads, 2, 1024, 2 if causal else 1)
    pool = Pool(row.batch * row.context * (RANK + ROPE))
    measure(row, plan, pool, fused=fused, repeats=1, name="")


def precompile(work: list[tuple[str, Row, Plan]], fused: bool, workers: int) -> None:
    # Heads reach the code only through the number of queries that share a tile.
    plans = {
        (replace(plan, splits=min(plan.splits, 2)), row.heads if row.queries > 1 else 16, row.queries > 1)
        for _, row, plan in work
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(plans)), mp_context=context) as executor:
        futures = {executor.submit(compile_one, *key, fused): key for key in plans}
        for done in as_completed(futures):
            if failed := done.exception():
                print(f"{futures[done]}: {type(failed).__name__}: {str(failed)[:200]}", file=sys.stderr)


def environment() -> dict[str, str]:
    import triton

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git.stdout.strip() or "unknown",
    }


def line(record: dict[str, Any], floor: float) -> str:
    row = Row(*(record[key] for key in ("heads", "batch", "context", "queries")))
    us = record["us"]
    return (
        f"{row.heads:4d} {row.batch:4d} {row.context:6d} {row.queries:2d}  {record['name']:15s} {record['plan']:30s} "
        f"{us:9.1f} {row.flops / us / 1e6:7.1f} {row.bytes / us / 1e6:6.2f} {floor / us:6.1%} {record['error']:9.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="auto", help=f"comma separated: auto, {', '.join(TILES)}")
    parser.add_argument("--sweep", action="store_true", help="tiles and splits over a few shapes")
    parser.add_argument("--separate", action="store_true", help="c_kv and k_pe in buffers of their own, not fused")
    parser.add_argument("--repeats", type=int, default=0, help="replays per measurement (default 9; sweep 5)")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile ahead; 0: none")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of the memory floor")
    parser.add_argument("--flops", type=float, default=790, help="TFLOP/s of the compute floor")
    parser.add_argument("--out", type=Path, help="write all records as JSON")
    arguments = parser.parse_args()
    repeats, fused = arguments.repeats or (5 if arguments.sweep else 9), not arguments.separate
    work = list(jobs(arguments))
    if arguments.workers:
        precompile(work, fused, arguments.workers)
    pool = Pool(max(max(row.bytes, COLD_BYTES * 2) for _, row, _ in work) // 2)
    info = environment()
    print(f"{info['gpu']}, torch {info['torch']}, triton {info['triton']}, {info['commit'][:10]}")
    print(
        "head bat. contxt  q  variant         plan                                  us  TFLOP/s   TB/s  share     error"
    )
    records = []
    for name, row, plan in work:
        floor = max(row.bytes / arguments.bandwidth, row.flops / arguments.flops) / 1e6
        try:
            record = measure(row, plan, pool, fused=fused, repeats=repeats, name=name)
        except Exception as failed:  # a plan that does not launch must not cost the others their run
            print(f"{row} {name} {plan}: {type(failed).__name__}: {str(failed)[:150]}")
            continue
        records.append({**record, "floor_us": floor})
        if not arguments.sweep:
            print(line(record, floor), flush=True)
    if arguments.sweep:
        for row in SWEEP:
            mine = sorted((r for r in records if Row(*(r[k] for k in ("heads", "batch", "context", "queries"))) == row),
                          key=lambda r: r["us"])  # fmt: skip
            for record in mine[:6]:
                print(line(record, record["floor_us"]))
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": info, "records": records}, indent=1))
    wrong = [r for r in records if not r["error"] <= 3e-3]
    if wrong:
        sys.exit(
            "wrong: "
            + "; ".join(f"{r['heads']}x{r['batch']}x{r['context']} {r['plan']} {r['error']:.1e}" for r in wrong)
        )


if __name__ == "__main__":
    main()
