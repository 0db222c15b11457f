"""What the kernels of ``row_product`` cannot take, in words. Needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlacompile.kernels.device import device_reasons
from mlacompile.kernels.fp8_linear.supports import rows_reasons


def triton_reasons(
    x: Tensor,
    weights: Sequence[Tensor],
    descales: Sequence[Tensor],
    norm: Tensor | None = None,
    added: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: str = "",
    early: bool = False,
) -> list[str]:
    """Why the kernel for 16 bits cannot run on these inputs; empty when it can. Called like ``row_product``."""
    reasons = device_reasons(x.device) + _rows_apart(x, norm, added)
    if descales:
        reasons.append("weights are FP8, the kernel takes those of the dtype of x")
    if x.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype is {x.dtype}, the kernel takes float16 and bfloat16")
    for weight in weights:
        if weight.stride(1) != 1:
            reasons.append(f"elements of a weight row lie {weight.stride(1)} apart, the kernel needs 1")
        if weight.stride(0) % 8 or weight.shape[1] % 8:
            reasons.append("weight rows are not a multiple of 16 bytes long or apart")
    return reasons


def fp8_reasons(
    x: Tensor,
    weights: Sequence[Tensor],
    descales: Sequence[Tensor],
    norm: Tensor | None = None,
    added: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: str = "",
    early: bool = False,
) -> list[str]:
    """Why the kernel for FP8 weights cannot run on these inputs; empty when it can. Called like ``row_product``."""
    if not descales:
        return ["weights have no scales, the kernel takes FP8"]
    reasons = _rows_apart(x, norm, added)
    for weight, descale in zip(weights, descales, strict=True):
        reasons += [r for r in rows_reasons(x, None, weight, descale, x.dtype) if r not in reasons]
    return reasons


def _rows_apart(x: Tensor, norm: Tensor | None, added: Tensor | None) -> list[str]:
    return [
        f"elements of {name} lie {row.stride(-1)} apart, the kernel needs 1"
        for name, row in (("x", x), ("norm", norm), ("added", added))
        if row is not None and row.stride(-1) != 1
    ]
