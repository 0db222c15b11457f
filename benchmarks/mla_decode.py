"""Times the kernels of ``mla_decode`` side by side on a GPU: cold L2, CUDA graphs, parity checked in the same run.

    python benchmarks/mla_decode.py --out results.json                      every kernel, over the table of shapes
    python benchmarks/mla_decode.py --kernels "triton;gluon" --rows 128x128x8192,16x1x8192
    python benchmarks/mla_decode.py --kernels "gluon;gluon@parts=33,min_share=4"
    python benchmarks/mla_decode.py --kernels "gluon-656-paged;gluon-656-paged@turned=0"   widened in place, too

A row is heads x batch x context, or heads x batch x context x queries; ``ragged`` in front draws lengths from 1 to
about four times the context that add up to as many tokens. ``-paged`` reads pages of 64 tokens in random order,
``-fp8`` e4m3 values with one factor a token (644 bytes), ``-656`` with four, all in one run of 656 bytes. Every call of
a replay reads another slice of one large pool, so that no cache is found in L2. The GPU rests before each measurement
and is not kept busy long enough to lower its clock, as it would under such a load for longer. ``share`` is the time of
the larger floor, bytes over the bandwidth or FLOPs over the throughput that this very run measured, in the time taken.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels.mla_decode.hopper_launch import choose_hopper_plan, mla_decode_hopper
from mlacompile.kernels.mla_decode.launch import device_of, mla_decode_portable, shape_of
from mlacompile.kernels.mla_decode.plan import NARROW_ROWS, choose_plan, next_power_of_2
from mlacompile.ops import mla_decode_reference
from mlacompile.ops.fp8_quantize import fp8_quantize_reference
from mlacompile.ops.mla_decode import dequantize_cache
from mlacompile.testing.timing import environment, replayed_us

RANK, ROPE, PAGE = 512, 64, 64
SCALE = 192**-0.5
COLD_BYTES = 256 << 20  # one replay reads at least this much, several times any L2
CALLS = 10  # at least so many a replay, whose launch takes as long as a small call
LIMIT, COARSE_LIMIT = 3e-3, 2e-2  # of the relative error, and where FP8 weights of the softmax are multiplied


@dataclass(frozen=True)
class Row:
    heads: int
    batch: int
    context: int
    queries: int = 1
    ragged: bool = False

    @classmethod
    def parse(cls, text: str) -> Row:
        """``[ragged]HxBxT[xS]``."""
        heads, batch, context, *rest = map(int, text.removeprefix("ragged").split("x"))
        return cls(heads, batch, context, rest[0] if rest else 1, text.startswith("ragged"))

    def __str__(self) -> str:
        return f"{'ragged' if self.ragged else ''}{self.heads}x{self.batch}x{self.context}x{self.queries}"

    def bytes(self, token: int = 2 * (RANK + ROPE)) -> int:
        """Read once, written once: cache (bytes of a token), queries, outputs."""
        return self.batch * self.context * token + 2 * self.batch * self.heads * self.queries * (2 * RANK + ROPE)

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.heads * self.queries * self.context * (2 * RANK + ROPE)

    def lengths(self) -> list[int]:
        """Tokens of each batch row: all alike, or from 1 to some multiple of ``context`` with that mean."""
        if not self.ragged:
            return [self.context] * self.batch
        gen = torch.Generator().manual_seed(0)
        drawn = torch.rand(self.batch, generator=gen) ** 3  # most rows short, a few long
        lengths = (drawn / drawn.mean() * self.context).to(torch.int64).clamp(min=1)
        return lengths.tolist()


TABLE = [
    *(Row(16, b, t) for b, t in ((1, 1024), (1, 8192), (1, 32768), (16, 8192), (64, 8192), (128, 4096))),
    *(Row(16, b, t) for b, t in ((128, 8192), (128, 32768))),
    *(Row(64, b, 8192) for b in (1, 64, 128)),
    *(Row(128, b, t) for b, t in ((1, 1024), (1, 8192), (1, 32768), (16, 8192), (64, 4096), (64, 8192))),
    *(Row(128, b, t) for b, t in ((128, 8192), (128, 32768))),
    *(Row(128, 64, 8192, 2), Row(16, 64, 8192, 2), Row(16, 64, 8192, 4), Row(20, 64, 8192), Row(40, 64, 8192)),
    Row(128, 64, 8192, ragged=True),
]

KERNELS = "triton;gluon;gluon-paged;triton-fp8;gluon-fp8;gluon-fp8-paged;triton-656;gluon-656;gluon-656-paged"


class Pool:
    """One large buffer of random bf16 latents, of which every call takes another slice."""

    def __init__(self, elements: int) -> None:
        self.data = torch.empty(elements, dtype=torch.bfloat16, device="cuda")
        for chunk in self.data.split(1 << 28):
            chunk.normal_()

    def slices(self, row: Row) -> list[Tensor]:
        """Disjoint [tokens, R+P], enough of them that a cycle outgrows L2."""
        pages = sum(-(-n // PAGE) for n in row.lengths())
        width = PAGE * (RANK + ROPE)
        count = max(1, min(-(-COLD_BYTES // (2 * pages * width)), self.data.numel() // (pages * width)))
        return list(self.data[: count * pages * width].view(count, -1, RANK + ROPE))


@dataclass(frozen=True)
class Call:
    """Arguments of one call, beside the queries, and the cache of its first batch row as plain tokens."""

    c_kv: Tensor
    k_pe: Tensor
    length: Tensor
    block_table: Tensor | None
    descale: Tensor | None
    first_row: Tensor


def stored(cache: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """A [units, tokens, R+P] cache as c_kv, k_pe and descale."""
    c_kv, k_pe = cache[..., :RANK], cache[..., RANK:]
    if kind == "bf16":
        return c_kv, k_pe, None
    group = RANK if kind == "fp8" else SCALE_GROUP
    made = [fp8_quantize_reference(part, group, torch.float8_e4m3fn) for part in c_kv.split(256)]
    values, descale = (torch.cat(parts) for parts in zip(*made, strict=True))
    if kind == "fp8":
        return values, k_pe.contiguous(), descale
    arrays = (values, descale, k_pe.contiguous())
    run = torch.cat([x.view(torch.uint8) for x in arrays], -1)
    c_raw, d_raw, p_raw = run.split([RANK, 16, 2 * ROPE], -1)
    return c_raw.view(values.dtype), p_raw.view(k_pe.dtype), d_raw.view(torch.float32)


def make_call(row: Row, tokens: Tensor, paged: bool, kind: str) -> Call:
    lengths = row.lengths()
    length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    if not paged:
        cache = tokens.view(row.batch, -1, RANK + ROPE)
        c_kv, k_pe, descale = stored(cache, kind)
        return Call(c_kv, k_pe, length, None, descale, said(c_kv[:1], k_pe[:1], descale)[0])
    cache = tokens.view(-1, PAGE, RANK + ROPE)
    order = torch.randperm(
        cache.shape[0], dtype=torch.int32, device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    counts = [-(-n // PAGE) for n in lengths]
    table = torch.zeros(row.batch, max(counts), dtype=torch.int32, device="cuda")
    for i, pages in enumerate(order.split(counts)):
        table[i, : counts[i]] = pages
    c_kv, k_pe, descale = stored(cache, kind)
    first = table[0, : counts[0]].long()
    first_row = said(c_kv[first], k_pe[first], None if descale is None else descale[first]).flatten(0, 1)
    return Call(c_kv, k_pe, length, table, descale, first_row)


def said(c_kv: Tensor, k_pe: Tensor, descale: Tensor | None) -> Tensor:
    """What a cache says, in float32: [units, tokens, R+P]."""
    values = c_kv.float() if descale is None else dequantize_cache(c_kv, k_pe, descale[: len(c_kv)], torch.float32)[0]
    return torch.cat([values, k_pe.float()], -1)


def queries(row: Row, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random queries: scores of a standard deviation of 1.73 times ``spread``."""
    gen = torch.Generator("cuda").manual_seed(0)
    made = torch.randn(row.batch, row.queries, row.heads, RANK + ROPE, device="cuda", generator=gen)
    made = (spread * made).bfloat16()
    q_latent, q_pe = made.transpose(1, 2).split([RANK, ROPE], dim=-1)
    return q_latent, q_pe


@dataclass(frozen=True)
class Contender:
    """A kernel and a cache: ``triton`` or ``gluon``, ``-fp8`` or ``-656``, ``-paged``; after an @ parts of its plan."""

    name: str

    @property
    def paged(self) -> bool:
        return "-paged" in self.name

    @property
    def kind(self) -> str:
        return "fp8" if "-fp8" in self.name else "656" if "-656" in self.name else "bf16"

    @property
    def token_bytes(self) -> int:
        return {"bf16": 1152, "fp8": 644, "656": 656}[self.kind]

    def plan(self, row: Row, call: Call) -> Any:
        kernel, _, changes = self.name.partition("@")
        device = device_of(torch.device("cuda", torch.cuda.current_device()))
        meta = torch.empty(row.batch, row.heads, row.queries, RANK + ROPE, dtype=torch.bfloat16, device="meta")
        q_latent, q_pe = meta.split([RANK, ROPE], -1)
        chosen: Any
        if kernel.startswith("gluon"):
            tensors = (q_latent, q_pe, call.c_kv, call.k_pe, None, None, call.block_table, call.descale)
            chosen = choose_hopper_plan(tensors, device)
        else:
            chosen = choose_plan(
                shape_of(q_latent, q_pe, call.c_kv, call.k_pe, None, call.block_table, call.descale), device
            )
        return replace(chosen, **{key: int(value) for key, value in (c.split("=") for c in changes.split(",") if c)})

    def runner(self, row: Row, q: tuple[Tensor, Tensor], plan: Any) -> Callable[[Call], Tensor]:
        keywords: dict[str, Any] = {"scale": SCALE, "causal": row.queries > 1, "plan": plan}
        run: Any = mla_decode_hopper if self.name.startswith("gluon") else mla_decode_portable

        def call(c: Call) -> Tensor:
            return run(*q, c.c_kv, c.k_pe, None, None, c.length, c.block_table, c.descale, **keywords)[0]

        return call


def error(row: Row, q: tuple[Tensor, Tensor], call: Call, out: Tensor) -> float:
    """Relative error of the first batch row against float32 (sums of a few thousand terms: about 1e-6)."""
    n = row.lengths()[0]
    first = call.first_row[None, :n].float()
    pair = (q[0][:1].float(), q[1][:1].float())
    want = mla_decode_reference(
        *pair, first[..., :RANK], first[..., RANK:], None, None, None, scale=SCALE, causal=row.queries > 1
    )[0]
    return float((out[:1].float() - want).norm() / want.norm())


def coarse(row: Row, kind: str, plan: Any) -> bool:
    """Whether long rows' weights of the softmax are rounded to one FP8 value."""
    rows = min(row.heads * row.queries, getattr(plan, "tile_rows", 0))
    wide = kind == "fp8" and getattr(plan, "turned", False) and rows > NARROW_ROWS
    return wide and row.context >= plan.coarse_from


def measure(row: Row, contender: Contender, pool: Pool, repeats: int, spread: float = 1.0) -> dict[str, Any]:
    calls = [make_call(row, tokens, contender.paged, contender.kind) for tokens in pool.slices(row)]
    q = queries(row, spread)
    plan = contender.plan(row, calls[0])
    run = contender.runner(row, q, plan)
    out = run(calls[0])
    wrong = error(row, q, calls[0], out)
    if not all(torch.equal(out, run(calls[0])) for _ in range(3)):
        wrong = float("nan")  # a result that changes between runs is a race
    replayed: list[Callable[[], object]] = [partial(run, call) for call in calls]
    microseconds = replayed_us(replayed * -(-CALLS // len(calls)), repeats, rested=True)
    return {
        **asdict(row),
        "name": contender.name,
        "spread": spread,
        "plan": str(plan),
        "bytes": row.bytes(contender.token_bytes),
        "us": microseconds,
        "error": wrong,
        "limit": COARSE_LIMIT if coarse(row, contender.kind, plan) else LIMIT,
    }


def compile_one(row: Row, contender: Contender) -> None:
    """Run once on a short cache, in a worker: the binaries go to Triton's cache on disk."""
    short = replace(row, context=512, ragged=False)
    measure(short, contender, Pool(2 * short.bytes()), 1)


def precompile(work: list[tuple[Row, Contender]], workers: int) -> None:
    # What reaches the code: divisibility of the heads by 16, the number of queries, and a power of two for the batch.
    kinds = {
        (row.heads % 16, row.heads > 16, row.queries, next_power_of_2(row.batch), c.name): (row, c) for row, c in work
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(kinds)), mp_context=context) as executor:
        futures = {executor.submit(compile_one, *pair): pair for pair in kinds.values()}
        for done in as_completed(futures):
            if failed := done.exception():
                print(f"{futures[done]}: {type(failed).__name__}: {str(failed)[:200]}", file=sys.stderr)


def ceilings() -> tuple[float, float]:
    """Bytes/s that a large copy moves, reads and writes together, and FLOP/s of a large bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copy = replayed_us([lambda: target.copy_(source)] * 2, 5, rested=True)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = replayed_us([lambda: a @ b] * 8, 5, rested=True)
    return 2 * source.numel() * 4 / copy * 1e6, 2 * 8192**3 / product * 1e6


def line(record: dict[str, Any], floor: float) -> str:
    row = Row(*(record[key] for key in ("heads", "batch", "context", "queries", "ragged")))
    us = record["us"]
    return (
        f"{row!s:>20s}  {record['name']:22s} {record['plan']:24s} {us:9.1f} {row.flops / us / 1e6:7.1f} "
        f"{record['bytes'] / us / 1e6:6.2f} {floor / us:6.1%} {record['error']:9.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=KERNELS, help="separated by semicolons")
    parser.add_argument("--rows", default="", help="comma separated; default: the whole table")
    parser.add_argument("--repeats", type=int, default=9, help="replays per measurement")
    parser.add_argument("--spread", type=float, default=1.0, help="of scores, in units of 1.73 (default 1)")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile ahead; 0: none")
    parser.add_argument("--out", type=Path, help="write all records as JSON")
    parser.add_argument("--commit", help="what is measured, where the tree has no git of its own")
    arguments = parser.parse_args()
    rows = [Row.parse(text) for text in arguments.rows.split(",")] if arguments.rows else TABLE
    work = [(row, Contender(name)) for row in rows for name in arguments.kernels.split(";")]
    work = [(row, c) for row, c in work if c.paged or not row.ragged]  # a contiguous cache cannot hold more than T
    if arguments.workers:
        precompile(work, arguments.workers)
    bandwidth, flops = ceilings()
    torch.cuda.empty_cache()
    pool = Pool(int(1.1 * max(max(row.bytes() for row in rows), COLD_BYTES * 2)) // 2)
    info = {**environment(), "copy TB/s": bandwidth / 1e12, "bf16 product TFLOP/s": flops / 1e12}
    info |= {"commit": arguments.commit} if arguments.commit else {}
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    print(f"{'row':>20s}  {'kernel':22s} {'plan':24s} {'us':>9s} TFLOP/s   TB/s  share     error")
    records = []
    for row, contender in work:
        floor = max(row.bytes(contender.token_bytes) / bandwidth, row.flops / flops) * 1e6
        try:
            record = measure(row, contender, pool, arguments.repeats, arguments.spread)
        except Exception as failed:  # a kernel that does not launch must not cost the others their run
            print(f"{row} {contender.name}: {type(failed).__name__}: {str(failed)[:150]}", flush=True)
            continue
        records.append({**record, "floor_us": floor})
        print(line(record, floor), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"environment": info, "records": records}, indent=1))
    wrong = [r for r in records if not r["error"] <= r["limit"]]
    if wrong:
        sys.exit("wrong: " + "; ".join(line(r, r["floor_us"]) for r in wrong))


if __name__ == "__main__":
    main()
