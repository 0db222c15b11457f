"""What the Triton kernel of ``quantize_rows`` cannot take, in words. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.kernels.device import capability_of, device_reasons

#: A program holds a row that is normalized in registers.
MAX_ROW = 16384


def triton_reasons(
    x: Tensor, added: Tensor | None, norm: Tensor | None, gated: Tensor | None, done: Tensor | None = None, *,
    eps: float, gate: str, parts: bool = False, squares: bool = False, spent: bool = False, beside: int = 0,
    dtype: torch.dtype | None = None,
) -> list[str]:  # fmt: skip
    """Why the kernel cannot run on these inputs; empty when it can. Called like ``quantize_rows``."""
    reasons = device_reasons(x.device)
    if not reasons and x.device.type == "cuda" and capability_of(x.device) < (8, 9):
        reasons.append("the GPU has no conversions to FP8 (compute capability 8.9 or newer)")
    rows = [t for t in (added, norm, gated) if t is not None]
    if any(t.stride(-1) != 1 for t in (x, *rows)):
        reasons.append("elements of a row are not next to each other")
    if any(t is not None and t.device != x.device for t in (*rows, done)):
        reasons.append("inputs lie on several devices")
    if norm is not None and norm.numel() > MAX_ROW and not squares:
        reasons.append(f"rows of {norm.numel()} values, the kernel normalizes up to {MAX_ROW}")
    if norm is not None and norm.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"the norm is {norm.dtype}")
    return reasons
