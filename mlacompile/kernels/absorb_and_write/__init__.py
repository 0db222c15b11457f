"""Kernels of ``absorb_and_write``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.absorb_and_write.supports import hopper_reasons, hopper_slower, triton_reasons
from mlacompile.kernels.registry import Kernel


def _run(*arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    from mlacompile.kernels.absorb_and_write.launch import absorb_and_write_triton

    return absorb_and_write_triton(*arguments, **settings)


def _run_hopper(*arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    from mlacompile.kernels.absorb_and_write.hopper_launch import absorb_and_write_hopper

    return absorb_and_write_hopper(*arguments, **settings)


KERNELS = (
    Kernel("heads", "absorb_and_write", hopper_reasons, _run_hopper, hopper_slower),
    Kernel("triton", "absorb_and_write", triton_reasons, _run),
)
