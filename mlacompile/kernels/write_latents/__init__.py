"""Kernels of ``write_latents``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.registry import Kernel
from mlacompile.kernels.write_latents.supports import triton_reasons


def _run(*arguments: Any, **settings: Any) -> Tensor:
    from mlacompile.kernels.write_latents.launch import write_latents_triton

    return write_latents_triton(*arguments, **settings)


KERNELS = (Kernel("triton", "write_latents", triton_reasons, _run),)
