"""Chooses tiles for ``row_product`` and launches it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mlacompile.kernels.row_product.portable import _row_product_kernel


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a step, and warps of a program."""

    block_n: int
    block_k: int
    num_warps: int


def choose_tiles(n: int, k: int) -> Tiles:
    """Tiles by measurement on an H200 (docs/kernels.md): long rows in long steps, few rows in small programs."""
    if k >= 8192:
        return Tiles(4, 2048, 4)
    if k < 2048:
        return Tiles(4, 512, 2)
    if n < 1024:
        return Tiles(1, 2048, 8)
    if n < 2048:
        return Tiles(2, 1024, 4)
    return Tiles(4, 1024, 4 if n < 8192 else 2)


def row_product_triton(x: Tensor, weight: Tensor, tiles: Tiles | None = None) -> Tensor:
    """``row_product`` by the Triton kernel, for inputs that ``triton_reasons`` has nothing against."""
    n, k = weight.shape
    tiles = tiles or choose_tiles(n, k)
    out = x.new_empty(1, n)
    _row_product_kernel[(-(-n // tiles.block_n),)](
        x, weight, out, n, k, weight.stride(0),
        BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, EVEN_K=k % tiles.block_k == 0, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out
