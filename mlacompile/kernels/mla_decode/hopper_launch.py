"""Launches the Hopper kernel: tiles, descriptors of the cache and room for partials, with no host sync."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlacompile.kernels.mla_decode.hopper import _mla_decode_hopper_kernel
from mlacompile.kernels.mla_decode.hopper_fp8 import _mla_decode_hopper_fp8_kernel
from mlacompile.kernels.mla_decode.hopper_in_place import _mla_decode_hopper_in_place_kernel
from mlacompile.kernels.mla_decode.hopper_turned import _mla_decode_hopper_turned_kernel
from mlacompile.kernels.mla_decode.launch import Launch, device_of, strides
from mlacompile.kernels.mla_decode.merge import _mla_merge_kernel
from mlacompile.kernels.mla_decode.plan import HopperPlan, Shape, hopper_plan, next_power_of_2
from mlacompile.kernels.mla_decode.widen import WIDEN

TILE_ROWS = 64
BLOCK = 64  # tokens
RIGHT_REGISTERS = 216
FP8_RIGHT_REGISTERS, FP8_WIDEN_REGISTERS = 160, 120
IN_PLACE_RIGHT_REGISTERS, IN_PLACE_WIDEN_REGISTERS = 160, 64
TURNED_VALUE_REGISTERS = {16: 128, 32: 128, 64: 176}  # by the columns of the turned output
PACK = {torch.bfloat16: "cvt.rn.bf16x2.f32 $0, $2, $1;", torch.float16: "cvt.rn.f16x2.f32 $0, $2, $1;"}
FACTORS = 4  # of a token in a box: TMA copies no less than 16 bytes
CHUNK = 256  # batch rows that the planner looks at together
MERGE_ELEMENTS = 4096
MERGE_PROGRAMS = 2048


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
    if descale is None or (plan is not None and (plan.in_place or plan.turned)):
        c_kv = c_kv if c_kv.data_ptr() % 16 == 0 else c_kv.clone()
        k_pe = k_pe if k_pe is None or k_pe.data_ptr() % 16 == 0 else k_pe.clone()
        descale = descale if descale is None or descale.data_ptr() % 16 == 0 else descale.clone()
    tensors = (q_latent, q_pe, c_kv, k_pe, start, length, block_table, descale)
    if plan is None:
        plan = hopper_plan(hopper_shape(tensors), device_of(q_latent.device))
    b, h, s, r = q_latent.shape
    out = q_latent.new_empty(b, h, s, r)
    lse = q_latent.new_empty(b, h, s, dtype=torch.float32)
    for launch in hopper_launches(tensors, out, lse, plan, scale=scale, causal=causal):
        launch.run()
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


def _descriptor(x: Tensor, box_rows: int, panel: int, *, swizzle: int | None = None) -> tuple[TensorDescriptor, int]:
    """[units, tokens, D] seen as [rows, D], and how many rows lie between units (batch rows or pages)."""
    units, tokens, columns = x.shape
    apart = tokens if units == 1 else x.stride(0) // x.stride(1)
    rows = (units - 1) * apart + tokens
    size = x.element_size()
    layout = NVMMASharedLayout(size * panel if swizzle is None else swizzle, element_bitwidth=8 * size, rank=2)
    return TensorDescriptor(x, [rows, columns], [x.stride(1), 1], [box_rows, panel], layout), apart


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
    tiles = -(-shape.rows // TILE_ROWS)
    slots = 2 * plan.parts if plan.parts > 1 else 1
    partial = q_latent.new_empty(slots, tiles * TILE_ROWS, r if plan.parts > 1 else 2)
    partial_lse = q_latent.new_empty(slots, tiles * TILE_ROWS, dtype=torch.float32)
    parts = q_latent.new_empty(b, 2, dtype=torch.int32)
    arguments = {
        "p_q": q_latent, "p_qpe": q_pe, "p_start": start, "p_length": length, "p_table": block_table,
        "p_out": out, "p_lse": lse, "p_part": partial, "p_part_lse": partial_lse, "p_parts": parts,
        "scale_log2": scale * math.log2(math.e), "B": b, "H": h, "S": s, "T": shape.tokens, "n_tiles": tiles,
        "n_pages": c_kv.shape[0], "stride_table": 0 if block_table is None else block_table.stride(0),
        "n_columns": 0 if block_table is None else block_table.shape[1], "min_share": plan.min_share,
        "overhead": plan.overhead, "CHUNK": 32 if b <= 32 else CHUNK, "MANY": b > CHUNK,
        **strides("q", "bhsr", q_latent), **strides("p", "bhsr", q_pe),
        "R": r, "P": shape.rope, "LEFT": columns.left, "QUARTER": columns.quarter, "PANEL": columns.panel,
        "BLOCK_P": max(next_power_of_2(shape.rope), 16) if shape.rope else 0,
        "PAGE": 0 if block_table is None else c_kv.shape[1], "CAUSAL": causal and s > 1, "ONE_QUERY": s == 1,
    }  # fmt: skip
    if descale is None:
        kernel, more = _mla_decode_hopper_kernel, _described(c_kv, k_pe, arguments)
    elif plan.turned:
        kernel, more = _mla_decode_hopper_turned_kernel, _turned(c_kv, k_pe, descale, q_latent.dtype, arguments)
        more |= {"p_out": out.view(torch.int32), "p_part": partial.view(torch.int32)}  # words of two values
        for name in ("LEFT", "QUARTER", "PANEL"):
            del arguments[name]
    elif plan.in_place:
        kernel, more = _mla_decode_hopper_in_place_kernel, _in_place(c_kv, k_pe, descale, q_latent.dtype, arguments)
    else:
        kernel, more = _mla_decode_hopper_fp8_kernel, _addressed(c_kv, k_pe, descale, q_latent.dtype)
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
    return {"d_c": d_c, "d_pe": d_pe, "apart_c": apart_c, "apart_pe": apart_pe, "RIGHT_REGS": RIGHT_REGISTERS}


def _addressed(c_kv: Tensor, k_pe: Tensor | None, descale: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """An FP8 cache as pointers see it: words of 32 bits, strides in pairs of them."""
    words = c_kv.view(torch.int32)
    rope = None if k_pe is None else k_pe.view(torch.int32)
    pairs = {
        f"pair_{name}{dim}": apart // 2
        for name, x in (("c", words), ("k", rope))
        for dim, apart in zip("bt", strides(name, "bt", x).values(), strict=True)
    }
    return {
        "p_c": words, "p_pe": rope, "p_scale": descale, **pairs, **strides("f", "bt", descale),
        "GROUPS": descale.shape[2], "G": next_power_of_2(descale.shape[2]), "CODE": WIDEN[c_kv.dtype, dtype, True],
        "RIGHT_REGS": FP8_RIGHT_REGISTERS, "WIDEN_REGS": FP8_WIDEN_REGISTERS,
    }  # fmt: skip


def _in_place(
    c_kv: Tensor, k_pe: Tensor | None, descale: Tensor, dtype: torch.dtype, arguments: dict[str, Any]
) -> dict[str, Any]:
    """An FP8 cache as TMA sees it: bytes in boxes as wide as a quarter, and factors."""
    box_rows = min(arguments["PAGE"], BLOCK) if arguments["PAGE"] else BLOCK
    d_c, apart_c = _descriptor(c_kv.view(torch.uint8), box_rows, arguments["QUARTER"])
    d_pe, apart_pe = (None, 0) if k_pe is None else _descriptor(k_pe, box_rows, arguments["BLOCK_P"])
    groups = descale.shape[2]
    if groups == 1:
        layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
        line = descale.flatten()
        d_scale, apart_scale = TensorDescriptor(line, list(line.shape), [1], [box_rows], layout), descale.shape[1]
    else:
        d_scale, apart_scale = _descriptor(descale, box_rows, FACTORS, swizzle=0)
    return {
        "d_c": d_c, "d_pe": d_pe, "d_scale": d_scale, "apart_c": apart_c, "apart_pe": apart_pe,
        "apart_scale": apart_scale, "GROUPS": groups, "CODE": WIDEN[c_kv.dtype, dtype, groups > 1],
        "RIGHT_REGS": IN_PLACE_RIGHT_REGISTERS, "WIDEN_REGS": IN_PLACE_WIDEN_REGISTERS,
    }  # fmt: skip


def _turned(
    c_kv: Tensor, k_pe: Tensor | None, descale: Tensor, dtype: torch.dtype, arguments: dict[str, Any]
) -> dict[str, Any]:
    """An FP8 cache as TMA sees it, and how the kernel that multiplies it as it is cuts its tiles."""
    box_rows = min(arguments["PAGE"], BLOCK) if arguments["PAGE"] else BLOCK
    d_c, apart_c = _descriptor(c_kv, box_rows, 128)
    d_pe, apart_pe = (None, 0) if k_pe is None else _descriptor(k_pe, box_rows, arguments["BLOCK_P"])
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    line = descale.flatten()
    columns = min(max(next_power_of_2(arguments["H"] * arguments["S"]), 16), TILE_ROWS)
    return {
        "d_c": d_c, "d_pe": d_pe, "d_scale": TensorDescriptor(line, list(line.shape), [1], [box_rows], layout),
        "apart_c": apart_c, "apart_pe": apart_pe, "apart_scale": descale.shape[1],
        "WIDTH": 256 if arguments["R"] <= 256 else 512, "STAGES": 3, "CODE": PACK[dtype], "COLS": columns,
        "AHEAD": True, "VALUE_REGS": TURNED_VALUE_REGISTERS[columns],
    }  # fmt: skip


def _merge(
    partial: Tensor, partial_lse: Tensor, parts: Tensor, out: Tensor, lse: Tensor, plan: HopperPlan, shape: Shape
) -> Launch:
    """Each program takes about 4096 elements of partials at once, which hides the latency of L2.

    One row in many parts is cut along its columns; many rows, most of which are whole, get few programs each.
    """
    width = next_power_of_2(shape.rank)
    slots = min(max(next_power_of_2(plan.parts // shape.batch + 1) // 2, 2), 64)  # about as many as a row has
    block_c = min(width, max(MERGE_ELEMENTS // slots, 32))
    rows = min(max(MERGE_ELEMENTS // (slots * block_c), 1), next_power_of_2(shape.rows))
    chunks = -(-shape.rank // block_c)
    groups = min(-(-shape.rows // rows), max(MERGE_PROGRAMS // (shape.batch * chunks), 1))
    arguments = {
        "p_part": partial, "p_part_lse": partial_lse, "p_parts": parts, "p_out": out, "p_lse": lse, "H": shape.heads,
        "S": shape.queries, "n_rows_padded": partial.shape[1], "R": shape.rank, "ROWS": rows, "BLOCK_C": block_c,
        "SLOTS": slots, "PDL": True,
    }  # fmt: skip
    return Launch(_mla_merge_kernel, (shape.batch, groups, chunks), arguments, {"num_warps": 4, "launch_pdl": True})
