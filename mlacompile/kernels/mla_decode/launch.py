"""Launches the portable kernels: turns tensors and a plan into kernel arguments, with no host sync."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mlacompile.kernels.device import interpreted
from mlacompile.kernels.launch import Launch
from mlacompile.kernels.mla_decode import plan as planning
from mlacompile.kernels.mla_decode.plan import Device, Plan, Shape
from mlacompile.kernels.mla_decode.portable import _mla_combine_kernel, _mla_decode_kernel


def mla_decode_portable(
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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """``mla_decode`` by the portable kernels, for inputs that ``portable_reasons`` has nothing against."""
    tensors = (q_latent, q_pe, c_kv, k_pe, mask, start, length, block_table, descale)
    if plan is None:
        shape = shape_of(q_latent, q_pe, c_kv, k_pe, mask, block_table, descale)
        plan = planning.choose_plan(shape, device_of(q_latent.device))
    b, h, s, r = q_latent.shape
    out = q_latent.new_empty(b, h, s, r)
    lse = q_latent.new_empty(b, h, s, dtype=torch.float32)
    for launch in launches(tensors, out, lse, plan, scale=scale, causal=causal):
        launch()
    return out, lse


def shape_of(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None = None,
    descale: Tensor | None = None,
) -> Shape:
    """What the plan may depend on."""
    b, h, s, r = q_latent.shape
    described = mask is None and block_table is None and descale is None and _describable(c_kv)
    if k_pe is not None:  # one row number serves both
        described = described and _describable(k_pe) and _rows_apart(k_pe) == _rows_apart(c_kv)
    rope = 0 if q_pe is None else q_pe.shape[3]
    tokens = c_kv.shape[1] if block_table is None else c_kv.shape[1] * block_table.shape[1]
    return Shape(b, h, s, tokens, r, rope, q_latent.element_size(), described)


@cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":  # interpreted
        return Device(capability=(8, 0), sm_count=4)
    properties = torch.cuda.get_device_properties(device)
    smem = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device((properties.major, properties.minor), properties.multi_processor_count, smem)


def _describable(x: Tensor) -> bool:
    """Whether a TMA descriptor can see [B, T, D] as [rows, D]: batch rows whole tokens apart, 16-byte aligned."""
    row, token = x.stride(0), x.stride(1)
    aligned = token * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return token > 0 and row % token == 0 and aligned and x.shape[0] * (row // token) < 2**31


def _rows_apart(x: Tensor) -> int:
    return x.stride(0) // x.stride(1)


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    b, t, d = x.shape
    rows = (b - 1) * _rows_apart(x) + t
    return TensorDescriptor(x, [rows, d], [x.stride(1), 1], block)


def launches(
    tensors: tuple[Tensor | None, ...], out: Tensor, lse: Tensor, plan: Plan, *, scale: float, causal: bool
) -> list[Launch]:
    """The main kernel and, with several splits, the combine. Meta tensors do, to compile without a GPU."""
    q_latent, q_pe, c_kv, k_pe, mask, start, length, block_table, descale = tensors
    assert q_latent is not None
    assert c_kv is not None
    shape = shape_of(q_latent, q_pe, c_kv, k_pe, mask, block_table, descale)
    b, h, s, r = q_latent.shape
    block_r, block_p = planning.block_rank(shape), planning.block_rope(shape)
    if plan.splits > 1:
        partial = q_latent.new_empty(plan.splits, b, shape.rows, r, dtype=torch.float32)
        partial_lse = q_latent.new_empty(plan.splits, b, shape.rows, dtype=torch.float32)
    else:
        partial, partial_lse = out, lse
    rope_scaled = descale is not None and k_pe is not None and k_pe.dtype.itemsize == 1
    pdl = plan.pdl and plan.splits > 1 and not interpreted()
    arguments = {
        "p_q": q_latent, "p_qpe": q_pe, "p_c": c_kv, "p_pe": k_pe,
        "d_c": _descriptor(c_kv, [plan.block_n, block_r]) if plan.tma else None,
        "d_pe": _descriptor(k_pe, [plan.block_n, block_p]) if plan.tma and k_pe is not None else None,
        "p_table": block_table, "p_scale": descale,
        "p_mask": mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask,
        "p_start": start, "p_length": length, "p_out": partial, "p_lse": partial_lse,
        "scale_log2": scale * math.log2(math.e), "H": h, "S": s, "T": shape.tokens,
        "n_pages": c_kv.shape[0],
        "d_rows": _rows_apart(c_kv) if plan.tma else 0, "zero": 0,
        **strides("q", "bhsr", q_latent), **strides("p", "bhsr", q_pe),
        **strides("c", "bt", c_kv), **strides("k", "bt", k_pe), **strides("m", "bst", mask),
        **strides("f", "bt", descale), "stride_tb": 0 if block_table is None else block_table.stride(0),
        "R": r, "P": shape.rope,
        "BLOCK_H": plan.block_h, "BLOCK_N": plan.block_n, "BLOCK_R": block_r, "BLOCK_P": block_p,
        "BLOCK_S": queries_in_tile(plan, shape), "SPLIT": plan.splits > 1,
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "CAUSAL": causal and s > 1, "PAGE": 0 if block_table is None else c_kv.shape[1],
        "GROUPS": 0 if descale is None else descale.shape[2] - rope_scaled, "ROPE_SCALED": rope_scaled,
        "TMA": plan.tma, "WIDE": plan.wide and descale is None, "STAGES": plan.num_stages, "PDL": pdl,
    }  # fmt: skip
    grid = (planning.row_tiles(plan, shape), plan.splits, b)
    result = [Launch(_mla_decode_kernel, grid, arguments, {"num_warps": plan.num_warps, "num_stages": plan.num_stages})]
    if plan.splits > 1:
        result.append(_combine(partial, partial_lse, out, lse, plan, shape, pdl))
    return result


def _combine(
    partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor, plan: Plan, shape: Shape, pdl: bool
) -> Launch:
    n_rows = shape.batch * shape.rows
    # Few rows: more programs by narrower columns, so that the partials are read by the whole chip.
    block_c = min(planning.next_power_of_2(shape.rank), 128 if n_rows < 512 else 512)
    arguments = {
        "p_part": partial, "p_part_lse": partial_lse, "p_out": out, "p_lse": lse, "n_rows": n_rows,
        "n_splits": plan.splits, "H": shape.heads, "S": shape.queries, "R": shape.rank,
        "BLOCK_SPLITS": planning.next_power_of_2(plan.splits), "BLOCK_C": block_c,
        "CHUNK": min(planning.next_power_of_2(plan.splits), 16), "PDL": pdl,
    }  # fmt: skip
    grid = (n_rows, -(-shape.rank // block_c), 1)
    return Launch(_mla_combine_kernel, grid, arguments, {"num_warps": 4, **({"launch_pdl": True} if pdl else {})})


def queries_in_tile(plan: Plan, shape: Shape) -> int:
    """Most distinct queries that the rows of one tile belong to, as a power of two."""
    if shape.heads % plan.block_h == 0:
        most = 1
    elif plan.block_h % shape.heads == 0:
        most = plan.block_h // shape.heads
    else:
        most = (plan.block_h - 2) // shape.heads + 2
    return planning.next_power_of_2(min(most, shape.queries))


def strides(name: str, dims: str, x: Tensor | None) -> dict[str, int]:
    """Strides by kernel argument name; 0 along a dimension of size 1, which is how a mask is broadcast."""
    if x is None:
        return {f"stride_{name}{dim}": 0 for dim in dims}
    return {f"stride_{name}{dim}": 0 if x.shape[i] == 1 else x.stride(i) for i, dim in enumerate(dims)}
