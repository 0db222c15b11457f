"""Kernels of ``fp8_normed``: that of ``fp8_linear`` for few rows, whose programs multiply whole rows of a result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlacompile.kernels.fp8_linear.supports import stream_reasons, stream_slower
from mlacompile.kernels.fp8_stacked import for_all, for_each
from mlacompile.kernels.registry import Kernel

_STACKED_REASONS, _STACKED_SLOWER = for_each(stream_reasons), for_all(stream_slower)


def _reasons(
    x: Tensor, x_descale: Tensor, squares: Tensor, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype,
    *, eps: float,
) -> list[str]:  # fmt: skip
    reasons = _STACKED_REASONS(x, x_descale, weights, descales, dtype)
    return reasons if squares.is_contiguous() else [*reasons, "sums of squares are not contiguous"]


def _slower(
    x: Tensor, x_descale: Tensor, squares: Tensor, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype,
    *, eps: float,
) -> list[str]:  # fmt: skip
    return _STACKED_SLOWER(x, x_descale, weights, descales, dtype)


def _run(
    x: Tensor, x_descale: Tensor, squares: Tensor, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype,
    *, eps: float,
) -> Any:  # fmt: skip
    from mlacompile.kernels.fp8_linear.stream_launch import fp8_stacked_stream

    return fp8_stacked_stream(x, x_descale, weights, descales, dtype, squares=squares, eps=eps)


KERNELS = (Kernel("stream", "fp8_normed", _reasons, _run, _slower),)
