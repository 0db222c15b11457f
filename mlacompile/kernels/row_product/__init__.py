"""Kernels of ``row_product``."""

from __future__ import annotations

from torch import Tensor

from mlacompile.kernels.registry import Kernel
from mlacompile.kernels.row_product.supports import fp8_reasons, triton_reasons


def _run_triton(
    x: Tensor,
    weights: list[Tensor],
    descales: list[Tensor],
    norm: Tensor | None,
    added: Tensor | None,
    *,
    eps: float,
    gate: str,
    early: bool = False,
) -> list[Tensor]:
    from mlacompile.kernels.row_product.launch import row_product_triton

    return row_product_triton(x, weights, norm, added, eps=eps, gate=gate, early=early)


def _run_fp8(
    x: Tensor,
    weights: list[Tensor],
    descales: list[Tensor],
    norm: Tensor | None,
    added: Tensor | None,
    *,
    eps: float,
    gate: str,
    early: bool = False,
) -> list[Tensor]:
    from mlacompile.kernels.row_product.launch import row_product_fp8

    return row_product_fp8(x, weights, descales, norm, added, eps=eps, gate=gate)


KERNELS = (
    Kernel("triton", "row_product", triton_reasons, _run_triton),
    Kernel("gluon", "row_product", fp8_reasons, _run_fp8),
)
