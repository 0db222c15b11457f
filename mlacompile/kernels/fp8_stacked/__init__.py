"""Kernels of ``fp8_stacked``: those of ``fp8_linear`` that take two weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels.fp8_linear.supports import MOST_ROWS, stream_reasons, stream_slower, tiles_reasons, tiles_slower
from mlacompile.kernels.registry import Kernel

_Reasons = Callable[[Tensor, Tensor | None, Tensor, Tensor, torch.dtype], list[str]]


def for_each(reasons: _Reasons) -> Callable[..., list[str]]:
    """What a kernel has against any of the weights, or against two of them in one launch."""

    def of_both(
        x: Tensor, x_descale: Tensor | None, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype
    ) -> list[str]:
        found = [r for w, s in zip(weights, descales, strict=True) for r in reasons(x, x_descale, w, s, dtype)]
        if len(weights) > 1 and weights[0].shape[0] % SCALE_GROUP:
            found.append(f"the first weight has {weights[0].shape[0]} rows, not a multiple of {SCALE_GROUP}")
        return list(dict.fromkeys(found))

    return of_both


def for_all(slower: _Reasons) -> Callable[..., list[str]]:
    """Why a kernel is slower by as large a weight as all of them are."""

    def of_both(
        x: Tensor, x_descale: Tensor | None, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype
    ) -> list[str]:
        rows = sum(w.shape[0] for w in weights)
        both = torch.empty((rows, weights[0].shape[1]), dtype=weights[0].dtype, device="meta")
        return slower(x, x_descale, both, descales[0], dtype)

    return of_both


def _tiles(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.launch import fp8_stacked_tiles

    return fp8_stacked_tiles(*args)


def _stream(*args: Any) -> Tensor:
    from mlacompile.kernels.fp8_linear.stream_launch import fp8_stacked_stream

    return fp8_stacked_stream(*args)


def _tiles_slower(
    x: Tensor, x_descale: Tensor | None, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype
) -> list[str]:
    """As of one weight; and a row or two by themselves have a kernel that takes one weight."""
    if x.shape[0] <= MOST_ROWS:
        return [f"{x.shape[0]} rows are multiplied faster by one weight after the other"]
    return for_all(tiles_slower)(x, x_descale, weights, descales, dtype)


KERNELS = (
    Kernel("triton", "fp8_stacked", for_each(tiles_reasons), _tiles, _tiles_slower),
    Kernel("stream", "fp8_stacked", for_each(stream_reasons), _stream, for_all(stream_slower)),
)
