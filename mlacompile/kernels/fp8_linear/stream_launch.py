"""Launches the Hopper kernel of ``fp8_linear`` for few rows, for one weight or two, and in parts that nobody adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP, filled_parts, scale_groups
from mlacompile.kernels.device import sms_of
from mlacompile.kernels.fp8_linear.hopper_launch import aligned, descriptor
from mlacompile.kernels.fp8_linear.launch import sum_launch
from mlacompile.kernels.fp8_linear.stream_tiles import COLUMNS, StreamTiles, choose_stream_tiles
from mlacompile.kernels.fp8_linear.supports import GROUP_ROWS
from mlacompile.kernels.launch import Launch, chained

REGISTERS = 232  # of a thread that multiplies: up to 96 sums, as many of one block, and addresses


def fp8_linear_stream(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype,
    tiles: StreamTiles | None = None,
) -> Tensor:  # fmt: skip
    """The op by the Hopper kernel for few rows, for inputs that ``stream_reasons`` has nothing against."""
    return fp8_stacked_stream(x, x_descale, [weight], [weight_descale], dtype, tiles)


def fp8_stacked_stream(
    x: Tensor, x_descale: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor], dtype: torch.dtype,
    tiles: StreamTiles | None = None, squares: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """As above, by one weight or two; with ``squares`` as ``fp8_normed``."""
    weights = [aligned(w) for w in weights]
    out = x.new_empty((x.shape[0], sum(w.shape[0] for w in weights)), dtype=dtype)
    for launch in stream_launches(aligned(x), x_descale, weights, descales, out, tiles, squares, eps):
        launch()
    return out


def fp8_normed_stream(
    x: Tensor, x_descale: Tensor, squares: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor],
    dtype: torch.dtype, *, eps: float, parts: int,
) -> Tensor:  # fmt: skip
    """``fp8_normed`` by the same kernel."""
    if parts == 1:
        return fp8_stacked_stream(x, x_descale, weights, descales, dtype, None, squares, eps)
    return _in_parts(x, x_descale, weights, descales, parts, squares, eps)


def fp8_parts_stream(x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, parts: int) -> Tensor:
    """``fp8_linear_parts`` by the same kernel."""
    return _in_parts(x, x_descale, [weight], [weight_descale], parts)


def _in_parts(
    x: Tensor, x_descale: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor], parts: int,
    squares: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """A product in parts of K that nobody has added up."""
    x, weights = aligned(x), [aligned(w) for w in weights]
    (m, k), n = x.shape, sum(w.shape[0] for w in weights)
    out = x.new_empty((parts, m, n), dtype=torch.float32)
    tiles = choose_stream_tiles(m, n, k, sms_of(x.device), parts)
    stream_launch(x, x_descale, weights, descales, out, tiles, squares, eps)()
    return out


def stream_launches(
    x: Tensor, x_descale: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor], out: Tensor,
    tiles: StreamTiles | None = None, squares: Tensor | None = None, eps: float = 0.0,
) -> list[Launch]:  # fmt: skip
    """The launches of the kernel, and of the sum if K is divided. Meta tensors do, to compile without a GPU."""
    (m, k), n = x.shape, out.shape[1]
    tiles = tiles or choose_stream_tiles(m, n, k, sms_of(x.device))
    tiles = replace(tiles, parts=filled_parts(scale_groups(k), tiles.parts))
    if tiles.parts == 1:
        return [stream_launch(x, x_descale, weights, descales, out[None], tiles, squares, eps)]
    partial = x.new_empty((tiles.parts, m, n), dtype=torch.float32)
    launch = stream_launch(x, x_descale, weights, descales, partial, tiles, squares, eps)
    return [launch, sum_launch(partial, out)]


def stream_launch(
    x: Tensor, x_descale: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor], out: Tensor,
    tiles: StreamTiles, squares: Tensor | None = None, eps: float = 0.0,
) -> Launch:  # fmt: skip
    """The launch of the kernel alone. out: ``[parts, M, N]`` in float32, or ``[1, M, N]`` in 16 bits."""
    from mlacompile.kernels.fp8_linear.stream import _fp8_stream_kernel

    (m, k), (parts, _, n) = x.shape, out.shape
    count, blocks_a_part = -(-n // tiles.width), -(-scale_groups(k) // parts)
    two, whole, strip = len(weights) == 2, out.dtype != torch.float32, tiles.strip
    arguments = {
        "d_x": descriptor(x, tiles.block_m, SCALE_GROUP), "p_x_descale": x_descale,
        "d_w": descriptor(weights[0], COLUMNS, SCALE_GROUP), "p_descale": descales[0],
        "d_w2": descriptor(weights[1], COLUMNS, SCALE_GROUP) if two else None, "p_descale2": descales[-1],
        "d_strip": descriptor(weights[0], strip, SCALE_GROUP) if strip else None,
        "d_strip2": descriptor(weights[1], strip, SCALE_GROUP) if strip and two else None,
        "d_out": descriptor(out[0], GROUP_ROWS, tiles.columns) if whole else None,
        "d_side": descriptor(out[0], GROUP_ROWS, tiles.strip_columns) if whole and strip else None,
        "p_part": None if whole else out, "p_squares": squares, "eps": eps, "M": m, "N": n, "N1": weights[0].shape[0],
        "K": k,
        "stride_xsm": x_descale.stride(0), "stride_xsk": x_descale.stride(1), "stride_sn": descales[0].stride(0),
        "stride_sn2": descales[-1].stride(0), "tiles": count, "blocks_a_part": blocks_a_part, "items": count * parts,
        "BLOCK_M": tiles.block_m, "BLOCKS": tiles.blocks, "STRIP": tiles.strip, "STAGES": tiles.stages,
        "REGS": REGISTERS, "TWO": two, "STRETCHES": 0 if squares is None else squares.shape[1],
    }  # fmt: skip
    options = {"num_warps": 4, **chained(x.device)}
    return Launch(_fp8_stream_kernel, (min(count * parts, sms_of(x.device)),), arguments, options)
