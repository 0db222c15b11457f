"""Kernels of ``fp8_normed``: that of ``fp8_stacked`` for few rows, whose sums are multiplied with the roots of rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.fp8_linear.supports import stream_reasons, stream_slower
from mlacompile.kernels.fp8_stacked import for_all, for_each
from mlacompile.kernels.registry import Kernel

_STACKED_REASONS, _STACKED_SLOWER = for_each(stream_reasons), for_all(stream_slower)


def _reasons(x: Tensor, x_descale: Tensor, squares: Tensor, *product: Any, eps: float, parts: int = 1) -> list[str]:
    reasons = _STACKED_REASONS(x, x_descale, *product)
    return reasons if squares.is_contiguous() else [*reasons, "sums of squares are not contiguous"]


def _slower(x: Tensor, x_descale: Tensor, squares: Tensor, *product: Any, eps: float, parts: int = 1) -> list[str]:
    return _STACKED_SLOWER(x, x_descale, *product)


def _run(x: Tensor, x_descale: Tensor, squares: Tensor, *product: Any, eps: float, parts: int = 1) -> Tensor:
    from mlacompile.kernels.fp8_linear.stream_launch import fp8_normed_stream

    return fp8_normed_stream(x, x_descale, squares, *product, eps=eps, parts=parts)


KERNELS = (Kernel("stream", "fp8_normed", _reasons, _run, _slower),)
