"""Kernels of ``quantize_rows``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.quantize_rows.supports import triton_reasons
from mlacompile.kernels.registry import Kernel


def _run(*arguments: Any, **settings: Any) -> list[Tensor]:
    from mlacompile.kernels.quantize_rows.launch import quantize_rows_triton

    return quantize_rows_triton(*arguments, **settings)


KERNELS = (Kernel("triton", "quantize_rows", triton_reasons, _run),)
