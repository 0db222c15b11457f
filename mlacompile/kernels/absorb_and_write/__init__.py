"""Kernels of ``absorb_and_write``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.absorb_and_write.supports import triton_reasons
from mlacompile.kernels.registry import Kernel


def _run(*arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    from mlacompile.kernels.absorb_and_write.launch import absorb_and_write_triton

    return absorb_and_write_triton(*arguments, **settings)


KERNELS = (Kernel("triton", "absorb_and_write", triton_reasons, _run),)
