"""Kernels of ``fp8_experts``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.fp8_experts.supports import experts_reasons
from mlacompile.kernels.registry import Kernel


def _triton(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_experts.launch import fp8_experts_triton

    return fp8_experts_triton(*args)


KERNELS = (Kernel("triton", "fp8_experts", experts_reasons, _triton),)
