"""Kernels of ``fp8_linear``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlacompile.kernels.fp8_linear.supports import (
    blas_reasons,
    heads_reasons,
    heads_slower,
    hopper_reasons,
    hopper_slower,
    rows_reasons,
    rows_slower,
    stream_reasons,
    stream_slower,
    tiles_reasons,
    tiles_slower,
)
from mlacompile.kernels.registry import Kernel


def _rows(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.launch import fp8_linear_rows

    return fp8_linear_rows(*args)


def _tiles(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.launch import fp8_linear_tiles

    return fp8_linear_tiles(*args)


def _hopper(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.hopper_launch import fp8_linear_hopper

    return fp8_linear_hopper(*args)


def _stream(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.stream_launch import fp8_linear_stream

    return fp8_linear_stream(*args)


def _heads(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.heads_launch import fp8_linear_heads

    return fp8_linear_heads(*args)


def _blas(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.blas import fp8_linear_blas

    return fp8_linear_blas(*args)


KERNELS = (
    Kernel("gluon", "fp8_linear", rows_reasons, _rows, rows_slower),
    Kernel("heads", "fp8_linear", heads_reasons, _heads, heads_slower),
    Kernel("triton", "fp8_linear", tiles_reasons, _tiles, tiles_slower),
    Kernel("stream", "fp8_linear", stream_reasons, _stream, stream_slower),
    Kernel("hopper", "fp8_linear", hopper_reasons, _hopper, hopper_slower),
    Kernel("cublas", "fp8_linear", blas_reasons, _blas),
)
