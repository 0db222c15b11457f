"""What the kernels of ``absorb_and_write`` cannot take, in words. Needs no Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.fp8_linear.supports import heads_reasons, heads_slower, tiles_reasons
from mlacompile.kernels.write_latents.supports import triton_reasons as write_reasons


def triton_reasons(x: Tensor, weight: Tensor, weight_descale: Tensor, *written: Any, **settings: Any) -> list[str]:
    """Why the Triton kernel cannot run on these inputs; empty when it can. Called like ``absorb_and_write``."""
    return _reasons(tiles_reasons(x, None, weight, weight_descale, x.dtype), x, *written, **settings)


def hopper_reasons(x: Tensor, weight: Tensor, weight_descale: Tensor, *written: Any, **settings: Any) -> list[str]:
    """Why the Hopper kernel cannot."""
    return _reasons(heads_reasons(x, None, weight, weight_descale, x.dtype), x, *written, **settings)


def hopper_slower(x: Tensor, weight: Tensor, weight_descale: Tensor, *written: Any, **settings: Any) -> list[str]:
    """Why the Triton kernel is faster where both can serve."""
    return heads_slower(x, None, weight, weight_descale, x.dtype)


def _reasons(product: list[str], x: Tensor, *written: Any, **settings: Any) -> list[str]:
    reasons = [*product, *write_reasons(*written, **settings)]
    if x.device != written[0].device:
        reasons.append("queries and latents lie on two devices")
    return list(dict.fromkeys(reasons))
