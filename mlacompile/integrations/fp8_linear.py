"""``FP8Linear`` of transformers served by this project's ops: on any device, with nothing to fetch.

A checkpoint in DeepSeek's FP8 format (``weight`` in e4m3, ``weight_scale_inv`` for blocks of 128 × 128) is loaded by
transformers into ``FP8Linear`` modules, which need kernels from the Hub. :func:`serve_fp8_linears` puts
``mlacompile::fp8_linear`` in their place: eager mode, stock ``torch.compile`` and this backend then compute such
models, and the backend absorbs their attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.ops.fp8_experts import fp8_experts
from mlacompile.ops.fp8_linear import E4M3, block_grid, fp8_linear
from mlacompile.ops.fp8_quantize import fp8_quantize, rounded


def serve_fp8_linears() -> None:
    """Let every ``FP8Linear`` and ``FP8Experts`` of transformers compute with this project's ops, from now on and in
    this process, whatever the implementation of experts."""
    from transformers.integrations import finegrained_fp8

    finegrained_fp8._FINEGRAINED_FP8 = finegrained_fp8.FineGrainedFP8(
        matmul=matmul, batched_matmul=batched_matmul, grouped_matmul=grouped_matmul
    )


def matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale_inv: Tensor,
    block_size: Any = None,
    output_dtype: torch.dtype | None = None,
    *,
    activation_scale: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T`` in FP8, as ``FP8Linear`` asks for it.

    Args:
        x: ``[…, K]``, floating point. weight: e4m3 ``[N, K]``.
        weight_scale_inv: float32 or e8m0, one for each block of 128 × 128, or a single one. It multiplies.
        block_size: (128, 128), or None with a single scale.
        output_dtype: of the result; that of x when None.
        activation_scale: one scale for all of x, measured beforehand; None: one for every 128 values of a row.
    Raises:
        UnsupportedInputError: other blocks, scales that are bytes, or shapes that do not fit together.
    """
    rows = x.reshape(-1, x.shape[-1])
    if activation_scale is None:
        q, descale = fp8_quantize(rows, SCALE_GROUP, E4M3)
    else:
        scale = activation_scale.to(torch.float32)
        q = rounded(rows.to(torch.float32), scale, E4M3)
        descale = scale.reshape(1, 1).expand(rows.shape[0], scale_groups(rows.shape[1]))
    out = fp8_linear(q, descale, weight, block_scales(weight, weight_scale_inv, block_size), output_dtype or x.dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def batched_matmul(
    x: Tensor, weight: Tensor, weight_scale_inv: Tensor, block_size: Any = None, *, expert_ids: Tensor, **unknown: Any
) -> Tensor:
    """``x[m] @ weight[expert_ids[m]].T`` in FP8: x ``[M, K]``, weights e4m3 ``[E, N, K]``. Rows of no expert are zero.

    Raises:
        UnsupportedInputError: as :func:`matmul` does, or settings that are not known here.
    """
    if unknown:
        raise UnsupportedInputError(f"FP8 experts: got settings {', '.join(unknown)}, which are not known here")
    q, descale = fp8_quantize(x, SCALE_GROUP, E4M3)
    scales = block_scales(weight, weight_scale_inv, block_size)
    return fp8_experts(q, descale, weight, scales, expert_ids, x.dtype)


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale_inv: Tensor,
    *,
    offsets: Tensor,
    tokens_per_expert: Tensor | None = None,
    block_size: Any = None,
    **unknown: Any,
) -> Tensor:
    """The same for rows in the order of their experts: those of expert e end before ``offsets[e]`` (int ``[E]``)."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
    expert_ids = torch.searchsorted(offsets, rows, right=True)
    return batched_matmul(x, weight, weight_scale_inv, block_size, expert_ids=expert_ids, **unknown)


def block_scales(weight: Tensor, scale: Tensor, block_size: Any = (SCALE_GROUP, SCALE_GROUP)) -> Tensor:
    """The scales of a weight as float32, one for each block of 128 × 128.

    Raises:
        UnsupportedInputError: blocks of another size, or scales that are bytes: an e8m0 exponent read as a number would
            be silently wrong.
    """
    if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu):
        raise UnsupportedInputError(
            f"got scales of {scale.dtype} for a weight {list(weight.shape)}; expected torch.float32 or "
            "torch.float8_e8m0fnu. Bytes that hold e8m0 exponents become scales by .view(torch.float8_e8m0fnu)."
        )
    grid = block_grid(*weight.shape[-2:])
    if scale.numel() == 1 and block_size is None:
        return scale.to(torch.float32).reshape(1, 1).expand(grid)
    if block_size is None or tuple(block_size) != (SCALE_GROUP, SCALE_GROUP):
        raise UnsupportedInputError(
            f"got blocks of {block_size} for a weight {list(weight.shape)}; expected ({SCALE_GROUP}, {SCALE_GROUP})"
        )
    return scale.to(torch.float32)
