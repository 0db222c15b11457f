"""Kernels of ``heads_quantized``: that of ``fp8_linear`` for a weight of each head, whose results leave in FP8."""

from __future__ import annotations

from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels.fp8_linear.supports import FILLED_ONCE, heads_reasons, heads_slower
from mlacompile.kernels.registry import Kernel


def _reasons(x: Tensor, weight: Tensor, weight_descale: Tensor, *, spent: bool = False) -> list[str]:
    reasons = heads_reasons(x, None, weight, weight_descale, x.dtype)
    if weight.shape[1] != SCALE_GROUP:
        reasons.append(f"a head has {weight.shape[1]} results, the kernel quantizes {SCALE_GROUP}")
    return reasons


def _slower(x: Tensor, weight: Tensor, weight_descale: Tensor, *, spent: bool = False) -> list[str]:
    return heads_slower(x, None, weight, weight_descale, x.dtype, FILLED_ONCE)


def _run(x: Tensor, weight: Tensor, weight_descale: Tensor, *, spent: bool = False) -> tuple[Tensor, Tensor]:
    from mlacompile.kernels.fp8_linear.heads_launch import heads_quantized_hopper

    return heads_quantized_hopper(x, weight, weight_descale, spent=spent)


KERNELS = (Kernel("heads", "heads_quantized", _reasons, _run, _slower),)
