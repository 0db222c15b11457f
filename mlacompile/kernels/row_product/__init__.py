"""Kernels of ``row_product``."""

from __future__ import annotations

from torch import Tensor

from mlacompile.kernels.registry import Kernel
from mlacompile.kernels.row_product.supports import triton_reasons


def _run(
    x: Tensor,
    weights: list[Tensor],
    norm: Tensor | None,
    added: Tensor | None,
    *,
    eps: float,
    gate: str,
    early: bool = False,
) -> list[Tensor]:
    from mlacompile.kernels.row_product.launch import row_product_triton

    return row_product_triton(x, weights, norm, added, eps=eps, gate=gate, early=early)


KERNELS = (Kernel("triton", "row_product", triton_reasons, _run),)
