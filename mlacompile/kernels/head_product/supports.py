"""What the Triton kernel of ``head_product`` cannot take, in words. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.kernels.device import device_reasons


def triton_reasons(x: Tensor, weight: Tensor, *, early: bool = False) -> list[str]:
    """Why the kernel cannot run on these inputs; empty when it can. Called like ``head_product``."""
    reasons = device_reasons(x.device)
    if x.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype is {x.dtype}, the kernel takes float16 and bfloat16")
    if x.stride(2) != 1:
        reasons.append(f"elements of x lie {x.stride(2)} apart, the kernel needs 1")
    inner = [d for d in (1, 2) if weight.stride(d) == 1]
    if not inner:
        reasons.append("neither dimension of a head's matrix is contiguous")
    elif any(weight.stride(d) % 8 for d in (0, 3 - inner[0])) or weight.shape[inner[0]] % 8:
        reasons.append("weight rows are not a multiple of 16 bytes long or apart")
    return reasons
