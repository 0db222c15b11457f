"""What the kernel of ``fp8_experts`` cannot take, in words. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.kernels.fp8_linear.supports import tiles_reasons

MOST_EXPERTS = 1024  # every program looks at where the rows of each expert begin


def experts_reasons(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, expert: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why the Triton kernel cannot run on these inputs; empty when it can."""
    reasons = tiles_reasons(x, x_descale, weight, weight_descale, dtype)
    if weight.shape[0] > MOST_EXPERTS:
        reasons.append(f"there are {weight.shape[0]} experts, the kernel takes up to {MOST_EXPERTS}")
    if expert.is_floating_point():
        reasons.append(f"experts are given as {expert.dtype}, the kernel needs integers")
    return reasons
