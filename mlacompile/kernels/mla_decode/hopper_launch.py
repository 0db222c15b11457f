"""Launches the Hopper kernel: tiles, descriptors of the cache and room for partials, with no host sync."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlacompile.kernels.drop import LINE, in_whole_lines
from mlacompile.kernels.launch import Launch
from mlacompile.kernels.mla_decode.hopper import _mla_decode_hopper_kernel
from mlacompile.kernels.mla_decode.hopper_in_place import _mla_decode_hopper_in_place_kernel
from mlacompile.kernels.mla_decode.hopper_turned import _mla_decode_hopper_turned_kernel
from mlacompile.kernels.mla_decode.launch import device_of, strides
from mlacompile.kernels.mla_decode.merge import _mla_merge_kernel
from mlacompile.kernels.mla_decode.plan import (
    WIDE_OVERHEAD,
    Device,
    HopperPlan,
    Shape,
    hopper_plan,
    next_power_of_2,
    parts_apart,
    turned_tile_rows,
)
from mlacompile.kernels.mla_decode.supports import turned_reasons
from mlacompile.kernels.mla_decode.widen import HEADROOM, WIDEN

TILE_ROWS = 64
BLOCK = 64  # tokens
RIGHT_REGISTERS = 208
FP8_RIGHT_REGISTERS, FP8_WIDEN_REGISTERS = 160, 64
SHRINK = 2.0**-7  # of queries in bfloat16, so that they fit into float16
TURNED_VALUE_REGISTERS = {16: 128, 32: 128, 64: 184}  # by the columns of the turned output
GROUPED_VALUE_REGISTERS = 120  # with several factors a token, whose scores need more
PACK = {torch.bfloat16: "cvt.rn.bf16x2.f32 $0, $2, $1;", torch.float16: "cvt.rn.f16x2.f32 $0, $2, $1;"}
FACTORS = 4  # of a token in a box: TMA copies no less than 16 bytes
CHUNK = 256  # batch rows at most that the planner looks at together
MERGE_SLOTS = 128  # partials of a row that are looked at together
SECOND_ROUND = 1.1  # times that many partials at most are looked at in a second round
MERGE_PROGRAMS = 1024


def mla_decode_hopper(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    block_table: Tensor | None = None,
    descale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    plan: HopperPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """``mla_decode`` by the Hopper kernel, for inputs that ``hopper_reasons`` has nothing against."""
    # Graphs choose a kernel before there is memory to look at; what TMA cannot address then is copied.
    c_kv = c_kv if c_kv.data_ptr() % 16 == 0 else c_kv.clone()
    k_pe = k_pe if k_pe is None or k_pe.data_ptr() % 16 == 0 else k_pe.clone()
    descale = descale if descale is None or descale.data_ptr() % 16 == 0 else descale.clone()
    tensors = (q_latent, q_pe, c_kv, k_pe, start, length, block_table, descale)
    if plan is None:
        plan = choose_hopper_plan(tensors, device_of(q_latent.device))
    b, h, s, r = q_latent.shape
    out = q_latent.new_empty(b, h, s, r)
    lse = q_latent.new_empty(b, h, s, dtype=torch.float32)
    for launch in hopper_launches(tensors, out, lse, plan, scale=scale, causal=causal):
        launch()
    return out, lse


@dataclass(frozen=True)
class Columns:
    """How the columns of a latent are divided: one left part, two quarters, all in panels that one TMA copy brings."""

    left: int
    quarter: int
    panel: int

    @classmethod
    def of(cls, rank: int) -> Columns:
        """The narrowest division that holds ``rank`` columns, at most 512. Columns beyond it read as zeros."""
        for left, quarter in ((64, 32), (128, 64), (256, 64), (256, 128)):
            if rank <= left + 2 * quarter:
                return cls(left, quarter, min(quarter, 64))
        raise ValueError(f"rank {rank} is beyond 512")


def hopper_shape(tensors: tuple[Tensor | None, ...]) -> Shape:
    """Sizes of a call. Tokens are those that a row can hold."""
    q_latent, q_pe, c_kv, _, _, _, block_table, _ = tensors
    assert q_latent is not None
    assert c_kv is not None
    b, h, s, r = q_latent.shape
    tokens = c_kv.shape[1] if block_table is None else block_table.shape[1] * c_kv.shape[1]
    return Shape(b, h, s, tokens, r, 0 if q_pe is None else q_pe.shape[3], q_latent.element_size())


def choose_hopper_plan(tensors: tuple[Tensor | None, ...], device: Device) -> HopperPlan:
    """The plan for a call: shapes, dtypes and strides decide, so meta tensors do."""
    c_kv, descale, shape = tensors[2], tensors[7], hopper_shape(tensors)
    assert c_kv is not None
    if descale is not None:
        tile_rows = turned_tile_rows(shape)
        if not turned_reasons(c_kv):
            plan = replace(hopper_plan(shape, device, tile_rows), turned=True)
            if tile_rows == TILE_ROWS:
                apart = parts_apart(shape, plan, descale.shape[2])
                plan = replace(plan, overhead=WIDE_OVERHEAD, apart=apart)
            return plan
    return hopper_plan(shape, device)


def _descriptor(x: Tensor, box_rows: int, panel: int, *, swizzle: int | None = None) -> tuple[TensorDescriptor, int]:
    """[units, tokens, D] seen as [rows, D], and how many rows lie between units (batch rows or pages)."""
    units, tokens, columns = x.shape
    apart = tokens if units == 1 else x.stride(0) // x.stride(1)
    rows = (units - 1) * apart + tokens
    size = x.element_size()
    layout = NVMMASharedLayout(size * panel if swizzle is None else swizzle, element_bitwidth=8 * size, rank=2)
    return TensorDescriptor(x, [rows, columns], [x.stride(1), 1], [box_rows, panel], layout), apart


def _by_panels(matrix: TensorDescriptor, panels: int) -> TensorDescriptor:
    """The same matrix as [panels, rows, columns of a panel], of which one box brings several panels."""
    rows, columns = matrix.shape
    box_rows, panel = matrix.block_shape
    layout = NVMMASharedLayout(panel * matrix.base.element_size(), 8 * matrix.base.element_size(), rank=3)
    strides = [panel, matrix.strides[0], 1]
    return TensorDescriptor(matrix.base, [columns // panel, rows, panel], strides, [panels, box_rows, panel], layout)


def hopper_launches(
    tensors: tuple[Tensor | None, ...], out: Tensor, lse: Tensor, plan: HopperPlan, *, scale: float, causal: bool
) -> list[Launch]:
    """The main kernel and, with several parts, the merge. Meta tensors do, to compile without a GPU."""
    q_latent, q_pe, c_kv, k_pe, start, length, block_table, descale = tensors
    assert q_latent is not None
    assert c_kv is not None
    shape = hopper_shape(tensors)
    b, h, s, r = q_latent.shape
    columns = Columns.of(r)
    tile_rows = TILE_ROWS
    if plan.turned and min(shape.rows, plan.tile_rows) <= TILE_ROWS // 2:
        tile_rows = TILE_ROWS // 2
    tiles = -(-shape.rows // tile_rows)
    slots = 2 * plan.parts if plan.parts > 1 else 1
    partial = q_latent.new_empty(slots, tiles * tile_rows, r if plan.parts > 1 else 2)
    partial_lse = q_latent.new_empty(slots, tiles * tile_rows, dtype=torch.float32)
    parts = q_latent.new_empty(b, 2, dtype=torch.int32)
    arguments = {
        "p_q": q_latent, "p_qpe": q_pe, "p_start": start, "p_length": length, "p_table": block_table,
        "p_out": out, "p_lse": lse, "p_part": partial, "p_part_lse": partial_lse, "p_parts": parts,
        "scale_log2": scale * math.log2(math.e), "B": b, "H": h, "S": s, "T": shape.tokens, "n_tiles": tiles,
        "n_pages": c_kv.shape[0], "stride_table": 0 if block_table is None else block_table.stride(0),
        "n_columns": 0 if block_table is None else block_table.shape[1], "min_share": plan.min_share,
        "overhead": plan.overhead, "CHUNK": 1 if b == 1 else min(max(next_power_of_2(b), 32), CHUNK), "MANY": b > CHUNK,
        **strides("q", "bhsr", q_latent), **strides("p", "bhsr", q_pe),
        "R": r, "P": shape.rope, "LEFT": columns.left, "QUARTER": columns.quarter, "PANEL": columns.panel,
        "BLOCK_P": max(next_power_of_2(shape.rope), 16) if shape.rope else 0,
        "PAGE": 0 if block_table is None else c_kv.shape[1], "CAUSAL": causal and s > 1, "ONE_QUERY": s == 1,
    }  # fmt: skip
    if descale is None:
        kernel, more = _mla_decode_hopper_kernel, _described(c_kv, k_pe, arguments)
    elif plan.turned:
        kernel = _mla_decode_hopper_turned_kernel
        more = _turned(c_kv, k_pe, descale, q_latent.dtype, tile_rows, plan, arguments)
        more |= {"p_out": out.view(torch.int32), "p_part": partial.view(torch.int32)}  # words of two values
        for name in ("LEFT", "QUARTER", "PANEL"):
            del arguments[name]
    else:
        kernel, more = _mla_decode_hopper_in_place_kernel, _in_place(c_kv, k_pe, descale, q_latent.dtype, arguments)
    arguments |= more
    result = [Launch(kernel, (tiles, plan.parts, 1), arguments, {"num_warps": 4, "launch_pdl": True})]
    if plan.parts > 1:
        result.append(_merge(partial, partial_lse, parts, out, lse, plan, shape))
    return result


def _described(c_kv: Tensor, k_pe: Tensor | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The cache as TMA sees it."""
    box_rows = min(arguments["PAGE"], BLOCK) if arguments["PAGE"] else BLOCK
    d_c, apart_c = _descriptor(c_kv, box_rows, arguments["PANEL"])
    d_pe, apart_pe = (None, 0) if k_pe is None else _descriptor(k_pe, box_rows, arguments["BLOCK_P"])
    return {
        "d_c": d_c, "d_pe": d_pe, "apart_c": apart_c, "apart_pe": apart_pe, "HALVES": arguments["n_tiles"] > 1,
        "RIGHT_REGS": RIGHT_REGISTERS,
    }  # fmt: skip


def _factors(descale: Tensor, box_rows: int) -> tuple[TensorDescriptor, int]:
    """Factors of an FP8 cache as TMA sees them: one a token in a line, several in rows of four."""
    if descale.shape[2] > 1:
        return _descriptor(descale, box_rows, FACTORS, swizzle=0)
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    line = descale.flatten()
    return TensorDescriptor(line, list(line.shape), [1], [box_rows], layout), descale.shape[1]


def _in_place(
    c_kv: Tensor, k_pe: Tensor | None, descale: Tensor, dtype: torch.dtype, arguments: dict[str, Any]
) -> dict[str, Any]:
    """An FP8 cache as TMA sees it: bytes in boxes as wide as a quarter, and factors."""
    box_rows = min(arguments["PAGE"], BLOCK) if arguments["PAGE"] else BLOCK
    d_c, apart_c = _descriptor(c_kv.view(torch.uint8), box_rows, arguments["QUARTER"])
    d_pe, apart_pe = (None, 0) if k_pe is None else _descriptor(k_pe, box_rows, arguments["BLOCK_P"])
    d_scale, apart_scale = _factors(descale, box_rows)
    groups = descale.shape[2]
    return {
        "d_c": d_c, "d_pe": d_pe, "d_scale": d_scale, "apart_c": apart_c, "apart_pe": apart_pe,
        "apart_scale": apart_scale, "GROUPS": groups, "CODE": WIDEN[c_kv.dtype, groups > 1],
        "HEADROOM": HEADROOM[c_kv.dtype] if groups > 1 else 1.0, "SHRINK": SHRINK if dtype == torch.bfloat16 else 1.0,
        "RIGHT_REGS": FP8_RIGHT_REGISTERS, "WIDEN_REGS": FP8_WIDEN_REGISTERS,
    }  # fmt: skip


def _turned(
    c_kv: Tensor,
    k_pe: Tensor | None,
    descale: Tensor,
    dtype: torch.dtype,
    tile_rows: int,
    plan: HopperPlan,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """An FP8 cache as TMA sees it, and how the kernel that multiplies it as it is cuts its tiles."""
    box_rows = min(arguments["PAGE"], BLOCK) if arguments["PAGE"] else BLOCK
    d_pe, apart_pe = (None, 0) if k_pe is None else _descriptor(k_pe, box_rows, arguments["BLOCK_P"])
    d_scale, apart_scale = _factors(descale, box_rows)
    columns = min(max(next_power_of_2(arguments["H"] * arguments["S"]), 16), tile_rows)
    stacked = tile_rows < TILE_ROWS  # leaves room for a stage more
    width = 256 if arguments["R"] <= 256 else 512
    d_c, apart_c = _descriptor(c_kv, box_rows, 128)
    several = descale.shape[2] > 1
    if box_rows == BLOCK and arguments["R"] % 128 == 0:
        d_c = _by_panels(d_c, width // 128)
    registers = TURNED_VALUE_REGISTERS[columns]
    if several and stacked:
        registers = GROUPED_VALUE_REGISTERS
    return {
        "d_c": d_c, "d_pe": d_pe, "d_scale": d_scale, "apart_c": apart_c, "apart_pe": apart_pe,
        "apart_scale": apart_scale, "GROUPS": descale.shape[2],
        "WIDTH": width, "STAGES": 4 if stacked else 3, "CODE": PACK[dtype],
        "COLS": columns, "STACKED": stacked, "APART": (plan.apart or several) and not stacked,
        "coarse_from": plan.coarse_from, "VALUE_REGS": registers,
    }  # fmt: skip


def _power_near(parts: int) -> int:
    """A power of two that is at least as large, or a little less: a few partials more are looked at in a second round,
    which few rows have, while twice the room halves the programs that run at once."""
    power = next_power_of_2(parts)
    return power // 2 if parts <= power // 2 * SECOND_ROUND else power


def _merge(
    partial: Tensor, partial_lse: Tensor, parts: Tensor, out: Tensor, lse: Tensor, plan: HopperPlan, shape: Shape
) -> Launch:
    """Each thread has four to eight loads in flight, and all of a row's partials are on their way at once.

    Few partials of a row are summed by one warp, a thread for each eight columns. Many are divided among threads, and
    the row along its columns among warps and programs. Many rows, most of which are whole, get few programs each.
    """
    width = max(next_power_of_2(shape.rank), 64)
    slots = min(_power_near(max(plan.parts // shape.batch, 2)), MERGE_SLOTS)  # about as many as a row has
    warps = 4
    wide = warps if slots > 8 else 1
    block_c = min(width, 512 if slots <= 4 else 256 if slots <= 16 else max(4096 // slots, 64))
    rows = warps // wide
    chunks = -(-shape.rank // block_c)
    groups = min(-(-shape.rows // rows), max(MERGE_PROGRAMS // (shape.batch * chunks), 1))
    arguments = {
        "p_part": partial, "p_part_lse": partial_lse, "p_parts": parts, "p_out": out, "p_lse": lse, "H": shape.heads,
        "S": shape.queries, "n_rows_padded": partial.shape[1], "n_parts": plan.parts, "R": shape.rank, "ROWS": rows,
        "SLOTS": slots, "BLOCK_C": block_c, "WIDE": wide, "ALONE": shape.batch == 1,
        # Of one batch row they are few: to drop them takes longer than memory is spared (measured, docs/kernels.md).
        "DROP": shape.batch > 1 and block_c * partial.itemsize % LINE == 0 and in_whole_lines(partial),
    }  # fmt: skip
    return Launch(_mla_merge_kernel, (shape.batch, groups, chunks), arguments, {"num_warps": warps, "launch_pdl": True})
