"""What the Triton kernel of ``absorb_and_write`` cannot take, in words. Needs no Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.fp8_linear.supports import tiles_reasons
from mlacompile.kernels.write_latents.supports import triton_reasons as write_reasons


def triton_reasons(x: Tensor, weight: Tensor, weight_descale: Tensor, *written: Any, **settings: Any) -> list[str]:
    """Why the kernel cannot run on these inputs; empty when it can. Called like ``absorb_and_write``."""
    product = tiles_reasons(x, None, weight, weight_descale, x.dtype)
    reasons = [*product, *write_reasons(*written, **settings)]
    if x.device != written[0].device:
        reasons.append("queries and latents lie on two devices")
    return list(dict.fromkeys(reasons))
