"""Kernels of ``fp8_normed``: that of ``fp8_stacked`` for few rows, whose sums are multiplied with the roots of rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.fp8_linear.supports import stream_reasons, stream_slower
from mlacompile.kernels.fp8_stacked import for_all, for_each
from mlacompile.kernels.registry import Kernel

_STACKED_REASONS, _STACKED_SLOWER = for_each(stream_reasons), for_all(stream_slower)


def _reasons(x: Tensor, x_descale: Tensor, squares: Tensor, *product: Any, eps: float) -> list[str]:
    reasons = _STACKED_REASONS(x, x_descale, *product)
    return reasons if squares.is_contiguous() else [*reasons, "sums of squares are not contiguous"]


def _slower(x: Tensor, x_descale: Tensor, squares: Tensor, *product: Any, eps: float) -> list[str]:
    return _STACKED_SLOWER(x, x_descale, *product)


def _run(x: Tensor, x_descale: Tensor, squares: Tensor, *product: Any, eps: float) -> Tensor:
    from mlacompile.kernels.fp8_linear.stream_launch import fp8_stacked_stream

    return fp8_stacked_stream(x, x_descale, *product, squares=squares, eps=eps)


KERNELS = (Kernel("stream", "fp8_normed", _reasons, _run, _slower),)
