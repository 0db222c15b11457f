"""What the Triton kernel of ``write_latents`` cannot take, in words. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels.device import device_reasons

#: A program holds a latent in registers.
MAX_RANK = 4096
MAX_ROPE = 256
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def triton_reasons(
    latent: Tensor, k_pe: Tensor | None, q_pe: Tensor | None, norm: Tensor | None, rotation: Tensor | None,
    slots: Tensor, c_cache: Tensor, k_cache: Tensor | None = None, descale: Tensor | None = None,
    *, eps: float, pairs: str, stored: torch.dtype, rope_stored: torch.dtype, group: int, scale_at: int, rope_at: int,
) -> list[str]:  # fmt: skip
    """Why the kernel cannot run on these inputs; empty when it can. Called like ``write_latents``."""
    reasons = device_reasons(latent.device)
    for name, x in (("latent", latent), ("k_pe", k_pe), ("q_pe", q_pe), ("norm", norm)):
        if x is None:
            continue
        if x.dtype not in _FLOATS:
            reasons.append(f"{name} is {x.dtype}, the kernel takes float16, bfloat16 and float32")
        if x.stride(-1) != 1:
            reasons.append(f"elements of {name} lie {x.stride(-1)} apart, the kernel needs 1")
    rank = latent.shape[-1]
    if rank > MAX_RANK:
        reasons.append(f"rank {rank}, the kernel takes up to {MAX_RANK}")
    if k_pe is not None and k_pe.shape[-1] > MAX_ROPE:
        reasons.append(f"rotary keys of {k_pe.shape[-1]} values, the kernel takes up to {MAX_ROPE}")
    if 0 < group < rank and group != SCALE_GROUP:
        reasons.append(f"groups of {group} values, the kernel takes {SCALE_GROUP} or all of a latent")
    for name, x in (("c_cache", c_cache), ("k_cache", k_cache), ("descale", descale)):
        if x is not None and not x.is_contiguous():
            reasons.append(f"{name} is not contiguous")
    if rotation is not None and not rotation.is_contiguous():
        reasons.append("the rotation is not contiguous")
    elsewhere = [x for x in (k_pe, q_pe, norm, rotation, slots, c_cache, k_cache, descale) if x is not None]
    if any(x.device != latent.device for x in elsewhere):
        reasons.append("inputs lie on several devices")
    return reasons
