"""What the compiler makes of the kernel, on any machine: wgmma and TMA on Hopper, nothing in local memory.

Variants whose every choice meets another variant too are compiled with ``MLACOMPILE_FULL=1`` only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

import triton

from mlacompile.cache.store import block_scaled_layout
from mlacompile.kernels.mla_decode.hopper_launch import Columns, hopper_launches, hopper_shape
from mlacompile.kernels.mla_decode.launch import launches
from mlacompile.kernels.mla_decode.plan import Device, Plan, Shape, choose_plan, hopper_plan
from mlacompile.kernels.mla_decode.supports import hopper_shape_reasons
from mlacompile.testing.sass import Compiled, _unordered, compile_for, table

SHAPE = Shape(batch=4, heads=128, queries=1, tokens=8192, rank=512, rope=64)
SMEM = Device().smem
FULL = os.environ.get("MLACOMPILE_FULL") == "1"


def few(count: int) -> int:
    """So many instructions on local memory with the compiler of Triton 3.6, for which registers are shared out; with
    another a few more, where some tokens of a block are not seen."""
    return count if triton.__version__.startswith("3.6.") else count + 8


@pytest.fixture
def build(record_property: Callable[[str, object], None]) -> Callable[..., Compiled]:
    """``compiled``, whose figures go into the table at the end of the run."""

    def recorded(plan: Plan, **settings: Any) -> Compiled:
        built = compiled(plan, **settings)
        record_property("compiled", table([built]))
        return built

    return recorded


def compiled(plan: Plan, capability: int = 90, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    """The main kernel of SHAPE, with lengths, from one fused cache, as it would be launched."""

    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    b, h, s, t, r, p = SHAPE.batch, SHAPE.heads, SHAPE.queries, SHAPE.tokens, SHAPE.rank, SHAPE.rope
    cache, length = meta(b, t, r + p), meta(b, dtype=torch.int32)
    tensors = (meta(b, h, s, r), meta(b, h, s, p), cache[..., :r], cache[..., r:], None, None, length, None, None)
    out, lse = meta(b, h, s, r), meta(b, h, s, dtype=torch.float32)
    launch = launches(tensors, out, lse, plan, scale=0.1, causal=False)[0]
    name = f"{plan} {str(dtype).removeprefix('torch.')} sm_{capability}"
    return compile_for(launch.kernel, launch.arguments, launch.options, capability=capability, name=name)


def test_default_plan_on_hopper(build: Callable[..., Compiled]) -> None:
    built = build(choose_plan(SHAPE, Device()))
    assert built.counts["HGMMA"] > 0
    assert built.counts["HMMA"] == 0
    assert built.counts["UTMALDG"] > 0
    assert built.local_memory == 0
    assert built.spill_bytes == 0
    assert built.serialized == 0
    assert built.smem <= SMEM


def test_pointer_loads_on_hopper(build: Callable[..., Compiled]) -> None:
    built = build(Plan(64, 64, 8, 2, wide=True))
    assert built.counts["HGMMA"] > 0
    assert built.counts["LDGSTS"] > 0, "tiles should come by cp.async"
    assert built.local_memory == 0
    assert built.smem <= SMEM


def test_float32_stays_float32(build: Callable[..., Compiled]) -> None:
    built = build(choose_plan(Shape(4, 128, 1, 8192, 512, 64, itemsize=4), Device()), dtype=torch.float32)
    assert built.counts["HGMMA"] == built.counts["HMMA"] == 0
    assert built.local_memory == 0


def test_ampere(build: Callable[..., Compiled]) -> None:
    ampere = Device((8, 0), 108, 166_912)
    built = build(choose_plan(SHAPE, ampere), capability=80)
    assert built.counts["HMMA"] > 0
    assert built.local_memory == 0
    assert built.smem <= ampere.smem


#: (heads, queries, rank, rope, page, dtype): every division of the columns, page size class, rope width and dtype.
HOPPER_VARIANTS = [
    (128, 1, 512, 64, 0, torch.bfloat16),
    *([(128, 1, 512, 64, 64, torch.bfloat16)] if FULL else []),
    (16, 4, 512, 64, 64, torch.bfloat16),
    (16, 1, 512, 64, 16, torch.float16),
    (128, 2, 384, 32, 0, torch.float16),
    (40, 1, 256, 32, 128, torch.bfloat16),
    (128, 1, 128, 0, 0, torch.bfloat16),
]


@cache
def build_hopper(
    heads: int,
    queries: int,
    rank: int,
    rope: int,
    page: int,
    dtype: torch.dtype,
    cached: str = "16 bits",
    merge: bool = True,
    **changes: Any,
) -> list[Compiled]:
    """The Hopper kernel and, if asked for, its merge, with lengths, as they would be launched.

    cached: "16 bits" in one fused cache, "per token" or "per block": FP8 in several arrays or in one run of bytes.
    changes: of the plan.
    """

    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    batch, tokens = 4, 8192
    units = (1000, page) if page else (batch, tokens)
    table = meta(batch, tokens // page, dtype=torch.int32) if page else None
    q_latent, q_pe = meta(batch, heads, queries, rank), meta(batch, heads, queries, rope) if rope else None
    length, descale = meta(batch, dtype=torch.int32), None
    if cached == "16 bits":
        cache = meta(*units, rank + rope)
        c_kv, k_pe = cache[..., :rank], cache[..., rank:]
    elif cached == "per token":
        c_kv, k_pe = meta(*units, rank, dtype=torch.float8_e4m3fn), meta(*units, rope)
        descale = meta(*units, 1, dtype=torch.float32)
    else:
        layout = block_scaled_layout(rank, rope, torch.float8_e4m3fn, dtype)
        assert layout.scale_at is not None
        assert layout.rope_at is not None
        run = meta(*units, layout.bytes_per_token, dtype=torch.uint8)
        c_kv = run[..., :rank].view(torch.float8_e4m3fn)
        descale = run[..., layout.scale_at : layout.scale_at + layout.scale_bytes].view(torch.float32)
        k_pe = run[..., layout.rope_at : layout.rope_at + layout.rope_bytes].view(dtype)
    tensors = (q_latent, q_pe, c_kv, k_pe if rope else None, None, length, table, descale)
    assert not hopper_shape_reasons(*tensors[:4], None, table, descale, 0.1)  # type: ignore[arg-type]
    out, lse = meta(batch, heads, queries, rank), meta(batch, heads, queries, dtype=torch.float32)
    plan = replace(hopper_plan(hopper_shape(tensors), Device()), **changes)
    built = hopper_launches(tensors, out, lse, plan, scale=0.1, causal=True)[: 1 + merge]
    kind = f"h{heads}s{queries}r{rank}p{rope}page{page} {str(dtype).removeprefix('torch.')}"
    return [compile_for(x.kernel, x.arguments, x.options, name=f"{x.kernel.__name__[5:-7]} {kind}") for x in built]


@pytest.mark.parametrize("variant", HOPPER_VARIANTS, ids=str)
def test_hopper(
    variant: tuple[int, int, int, int, int, torch.dtype], record_property: Callable[[str, object], None]
) -> None:
    main, merge = build_hopper(*variant)
    record_property("compiled", table([main, merge]))
    _, _, rank, rope, page, _ = variant
    columns = Columns.of(rank)
    assert main.counts["HMMA"] == 0
    products = 4 + 3 * (columns.left + 2 * columns.quarter + rope) // 16  # at least one product a panel
    assert main.counts["HGMMA"] >= products // 3
    copies = -(-64 // page) if 0 < page < 64 else 1
    panels = (columns.left + 2 * columns.quarter) // columns.panel + (1 if rope else 0)
    assert main.counts["UTMALDG"] == panels * copies, "every part of the cache should come by TMA, and nothing twice"
    assert main.counts["LDGSTS"] == 0
    assert main.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert main.unordered == 0, "a thread arrives for warps that may not have come so far"
    assert main.local_memory <= few(0)
    assert main.registers <= 168, "12 warps share the registers until the partitions take theirs"
    assert main.smem <= SMEM
    assert merge.local_memory == merge.too_early == 0


#: The same, and how the FP8 cache lies.
FP8_VARIANTS = [
    *([(128, 1, 512, 64, 0, torch.bfloat16, "per token")] if FULL else []),
    (128, 1, 512, 64, 64, torch.bfloat16, "per block"),
    (16, 4, 512, 64, 64, torch.bfloat16, "per token"),
    (128, 1, 384, 32, 0, torch.float16, "per block"),
    (40, 1, 256, 32, 32, torch.bfloat16, "per token"),
    (20, 1, 128, 0, 0, torch.bfloat16, "per token"),
]


Record = Callable[[str, object], None]


@pytest.mark.parametrize("variant", FP8_VARIANTS, ids=str)
def test_widening_in_place(variant: tuple[int, int, int, int, int, torch.dtype, str], record_property: Record) -> None:
    main, merge = build_hopper(*variant)
    record_property("compiled", table([main, merge]))
    _, _, rank, rope, page, _, _ = variant
    columns = Columns.of(rank)
    boxes = (columns.left + 2 * columns.quarter) // columns.quarter + 1 + (1 if rope else 0)  # bytes, factors, rope
    copies = -(-64 // page) if 0 < page < 64 else 1
    assert main.counts["UTMALDG"] == boxes * copies, "every part of the cache should come by TMA, and nothing twice"
    assert main.counts["HMMA"] == main.counts["LDGSTS"] == 0
    assert main.counts["HGMMA"] >= 16
    assert main.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert main.unordered == 0, "a thread arrives for warps that may not have come so far"
    assert max(main.local_in_loops) <= few(0), "what spills is beside the loops"
    assert main.registers <= 128, "16 warps share the registers until the partitions take theirs"
    assert main.smem <= SMEM
    assert merge.local_memory == 0


#: Every number of columns of the turned output and width of a latent, page size class and dtype.
TURNED_VARIANTS = [
    (128, 1, 512, 64, 64, torch.bfloat16),
    *([(40, 1, 256, 32, 32, torch.bfloat16)] if FULL else []),
    (16, 1, 512, 64, 64, torch.bfloat16),
    (16, 4, 512, 64, 0, torch.float16),
    (20, 1, 256, 32, 32, torch.bfloat16),
    (7, 1, 128, 0, 0, torch.bfloat16),
]


#: With several factors a token: every number of groups of columns and of columns of the turned output, causal and not.
GROUPED_VARIANTS = [
    (16, 1, 512, 64, 64, torch.bfloat16),
    *([(8, 4, 512, 64, 0, torch.bfloat16)] if FULL else []),
    (16, 2, 384, 64, 64, torch.float16),
    (20, 1, 256, 32, 32, torch.bfloat16),
    (7, 1, 512, 0, 0, torch.bfloat16),
]


def copies(rank: int, rope: int, page: int) -> int:
    """How often TMA is asked for a block: latents, at once where panels are whole, factors, rotary keys."""
    width, pieces = 256 if rank <= 256 else 512, -(-64 // page) if 0 < page < 64 else 1
    panels = 1 if pieces == 1 and rank % 128 == 0 else width // 128
    return (panels + 1 + (1 if rope else 0)) * pieces


@pytest.mark.parametrize("variant", GROUPED_VARIANTS, ids=str)
def test_fp8_products_with_several_factors(
    variant: tuple[int, int, int, int, int, torch.dtype], record_property: Record
) -> None:
    (main,) = build_hopper(*variant, cached="per block", merge=False, turned=True)
    record_property("compiled", table([main]))
    _, queries, rank, rope, page, _ = variant
    groups = -(-rank // 128)
    assert main.counts["UTMALDG"] == copies(rank, rope, page)
    assert main.counts["QGMMA"] == 2 * groups * 128 // 32, "keys as they are, before the loop and in it"
    assert main.counts["HGMMA"] == 2 * rope // 16 + groups * 2 * 64 // 16, "even and odd columns of each group"
    products = groups + (1 if rope else 0)
    assert main.counts["DEPBAR"] == 2 * (products - 1) + groups * 64 // 16, "one wait a product, no more"
    assert main.counts["HMMA"] == main.counts["LDGSTS"] == 0
    assert main.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert main.unordered == 0, "a thread arrives for warps that may not have come so far"
    assert main.local_in_loops == (0, 0), "what spills is beside the loops"
    if queries == 1:
        assert main.local_memory == main.spill_bytes == 0
    assert main.registers <= 128, "16 warps share the registers until the partitions take theirs"
    assert main.smem <= SMEM


@pytest.mark.parametrize("variant", TURNED_VARIANTS, ids=str)
def test_fp8_products(variant: tuple[int, int, int, int, int, torch.dtype], record_property: Record) -> None:
    (main,) = build_hopper(*variant, cached="per token", merge=False, turned=True)
    record_property("compiled", table([main]))
    heads, queries, rank, rope, page, _ = variant
    width = 256 if rank <= 256 else 512
    stacked = heads * queries <= 32
    places = 1 if stacked else 6  # two groups fetch, the first block of an item, later ones, and one the third
    assert main.counts["UTMALDG"] == copies(rank, rope, page) * places
    keys = 2 * (1 if stacked else 2) * width // 32  # before the loop and in it, or in those of two groups
    values = 0 if stacked else width // 64
    assert main.counts["QGMMA"] == keys + values, "keys, and values of long rows, for 32 tokens of even or odd columns"
    wide = 2 * rope // 16 + 4 * width // 128
    assert main.counts["HGMMA"] == wide, "a product for 16 tokens of 64 even or odd columns"
    assert main.counts["HMMA"] == main.counts["LDGSTS"] == 0
    assert main.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert main.unordered == 0, "a thread arrives for warps that may not have come so far"
    # In causal order limits of rows spill, of which wide tiles have more and 72 registers for scores.
    assert main.local_in_loops[0] <= few(0 if queries == 1 else 4 if stacked else 6)
    assert main.local_in_loops[1] == 0
    if stacked:
        assert main.local_memory == main.spill_bytes == 0
    assert main.registers <= 128, "16 warps share the registers until the partitions take theirs"
    assert main.smem <= SMEM


@pytest.mark.parametrize(
    ("variant", "cached"),
    [
        ((128, 1, 512, 64, 64, torch.bfloat16), "per token"),
        ((16, 4, 512, 64, 0, torch.float16), "per token"),
        *([((40, 1, 256, 0, 32, torch.bfloat16), "per token")] if FULL else []),
        ((128, 1, 512, 64, 64, torch.bfloat16), "per block"),
        ((16, 4, 384, 0, 0, torch.float16), "per block"),
    ],
    ids=str,
)
def test_fp8_products_of_both_parts_at_once(
    variant: tuple[int, int, int, int, int, torch.dtype], cached: str, record_property: Record
) -> None:
    """Keys on the left and both parts of the queries on the right, summed up in float16."""
    (main,) = build_hopper(*variant, cached=cached, merge=False, turned=True, apart=True)
    record_property("compiled", table([main]))
    _, _, rank, rope, page, _ = variant
    width = 256 if rank <= 256 else 512
    several = cached == "per block"
    assert main.counts["UTMALDG"] == 6 * copies(rank, rope, page)
    columns, coarse = (-(-rank // 128) * 128, 0) if several else (width, width // 64)
    assert main.counts["QGMMA"] == 2 * columns // 32 + coarse, "one product for both parts, in two groups of warps"
    assert main.counts["HGMMA"] == 2 * rope // 16 + 4 * width // 128
    assert main.counts["HMMA"] == main.counts["LDGSTS"] == 0
    assert main.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert main.unordered == 0, "a thread arrives for warps that may not have come so far"
    # Several factors need registers that there are not; in causal order limits of rows spill, too.
    assert main.local_in_loops[0] <= few((29 if variant[1] == 1 else 40) if several else 6)
    assert main.local_in_loops[1] == 0
    assert main.registers <= 128, "16 warps share the registers until the partitions take theirs"
    assert main.smem <= SMEM


@pytest.mark.parametrize("cached", ["per token", "per block"])
def test_fp8_products_in_narrow_tiles(cached: str, record_property: Record) -> None:
    """128 rows as four tiles are what 32 rows are."""
    variant = (512, 64, 64, torch.bfloat16)
    (main,) = build_hopper(128, 1, *variant, cached=cached, merge=False, turned=True, tile_rows=32)
    (one,) = build_hopper(32, 1, *variant, cached=cached, merge=False, turned=True)
    record_property("compiled", table([main]))
    assert {k: main.counts[k] for k in ("QGMMA", "HGMMA", "UTMALDG")} == {
        k: one.counts[k] for k in ("QGMMA", "HGMMA", "UTMALDG")
    }
    assert main.serialized == main.unordered == 0
    assert main.local_in_loops == (0, 0), "what spills is beside the loops"
    assert main.smem <= SMEM


def test_an_arrival_before_other_warps_have_come_is_seen() -> None:
    def counted(*code: str) -> int:
        return _unordered("\n".join(f"        /*{i:04x}*/   {x} ;" for i, x in enumerate(code)))

    arrival = "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x38], RZ"
    assert counted("STS.128 [R1], R4", "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "MUFU.EX2 R1, R2", arrival) == 0
    assert counted("BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "STS.128 [R1], R4", arrival) == 1
    assert counted("BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "WARPGROUP.DEPBAR.LE gsb0, 0x0", arrival, arrival) == 2
    assert counted("LDS R1, [R2]", "SYNCS.ARRIVE.TRANS64 RZ, [UR4], R2") == 0, "announces bytes, for itself alone"
