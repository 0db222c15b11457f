"""Launches the Triton kernel of ``write_latents``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mlacompile.kernels.device import chains
from mlacompile.kernels.launch import chained
from mlacompile.kernels.write_latents.portable import _write_latents_kernel
from mlacompile.kernels.write_latents.rows import destinations
from mlacompile.ops.write_latents import empty_queries

#: Values of queries a program rotates: 16 heads of 64, so that 128 heads are eight programs.
_QUERY_TILE = 1024


def write_latents_triton(
    latent: Tensor, k_pe: Tensor | None, q_pe: Tensor | None, norm: Tensor | None, rotation: Tensor | None,
    slots: Tensor, c_cache: Tensor, k_cache: Tensor | None = None, descale: Tensor | None = None, **settings: Any,
) -> Tensor:  # fmt: skip
    """``write_latents`` by the Triton kernel, for inputs that ``triton_reasons`` has nothing against."""
    out = empty_queries(latent, q_pe)
    tensors = latent, k_pe, q_pe, norm, rotation, slots, c_cache, k_cache, descale
    grid, arguments, options = launch(*tensors, out, **settings)
    if grid[0]:
        _write_latents_kernel[grid](**arguments, **options)
    return out


def launch(
    latent: Tensor, k_pe: Tensor | None, q_pe: Tensor | None, norm: Tensor | None, rotation: Tensor | None,
    slots: Tensor, c_cache: Tensor, k_cache: Tensor | None, descale: Tensor | None, out: Tensor,
    *, eps: float, pairs: str, stored: torch.dtype, rope_stored: torch.dtype, group: int, scale_at: int, rope_at: int,
) -> tuple[tuple[int], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Grid, arguments and options of one launch. Meta tensors do, to compile without a GPU."""
    batch, tokens, rank = latent.shape
    rope = 0 if k_pe is None else k_pe.shape[-1]
    into, keys, scales = destinations(
        c_cache, k_cache, descale, rank, rope,
        stored=stored, rope_stored=rope_stored, group=group, scale_at=scale_at, rope_at=rope_at,
    )  # fmt: skip
    block_r, block_p = triton.next_power_of_2(rank), triton.next_power_of_2(max(rope, 1))
    heads = 0 if q_pe is None else q_pe.shape[1]
    block_h = min(triton.next_power_of_2(max(heads, 1)), max(1, _QUERY_TILE // block_p))

    def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
        return (0,) * count if x is None else x.stride()[:count]

    arguments = {
        "p_latent": latent, "p_norm": norm, "p_k": k_pe, "p_q": q_pe, "p_factors": rotation, "p_slots": slots,
        "p_into": into, "p_scales": scales, "p_keys": keys, "p_out": None if q_pe is None else out,
        **dict(zip(("stride_lb", "stride_ls"), strides(latent, 2), strict=True)),
        **dict(zip(("stride_kb", "stride_ks"), strides(k_pe, 2), strict=True)),
        **dict(zip(("stride_qb", "stride_qh", "stride_qs"), strides(q_pe, 3), strict=True)),
        **dict(zip(("stride_ib", "stride_it"), strides(into, 2), strict=True)),
        **dict(zip(("stride_sb", "stride_st"), strides(scales, 2), strict=True)),
        **dict(zip(("stride_yb", "stride_yt"), strides(keys, 2), strict=True)),
        "B": batch, "S": tokens, "T": into.shape[1], "H": heads, "eps": eps,
        "R": rank, "P": rope, "BLOCK_R": block_r, "BLOCK_P": block_p, "BLOCK_H": block_h,
        "GROUP": min(group, block_r) if group < rank else block_r,
        "LARGEST": float(torch.finfo(stored).max) if group else 0.0,
        "PAIRS": pairs, "PDL": chains(latent.device),
    }  # fmt: skip
    programs = batch * tokens * (1 + triton.cdiv(heads, block_h))
    # Asserts are part of the kernel (debug), checks of every addition are not.
    options = {"num_warps": 4, "debug": True, "sanitize_overflow": False, **chained(latent.device)}
    return (programs,), arguments, options
