"""Kernels of ``fp8_linear_parts``: that of ``fp8_linear`` for few rows, which divides K, without the sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlacompile.kernels.fp8_linear.supports import stream_reasons, stream_slower
from mlacompile.kernels.registry import Kernel


def _reasons(x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, parts: int) -> list[str]:
    return stream_reasons(x, x_descale, weight, weight_descale, torch.bfloat16)


def _slower(x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, parts: int) -> list[str]:
    return stream_slower(x, x_descale, weight, weight_descale, torch.bfloat16)


def _run(*arguments: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.stream_launch import fp8_parts_stream

    return fp8_parts_stream(*arguments)


KERNELS = (Kernel("stream", "fp8_linear_parts", _reasons, _run, _slower),)
