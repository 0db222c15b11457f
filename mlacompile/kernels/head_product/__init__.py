"""Kernels of ``head_product``."""

from __future__ import annotations

from torch import Tensor

from mlacompile.kernels.head_product.supports import triton_reasons
from mlacompile.kernels.registry import Kernel


def _run(x: Tensor, weight: Tensor, *, early: bool = False) -> Tensor:
    from mlacompile.kernels.head_product.launch import head_product_triton

    return head_product_triton(x, weight, early=early)


KERNELS = (Kernel("triton", "head_product", triton_reasons, _run),)
