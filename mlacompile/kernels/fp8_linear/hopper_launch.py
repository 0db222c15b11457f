"""Chooses tiles for the Hopper kernel of ``fp8_linear`` and launches it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlacompile.geometry import SCALE_GROUP, filled_parts, scale_groups
from mlacompile.kernels.device import SMEM, sms_of
from mlacompile.kernels.fp8_linear.launch import sum_launch
from mlacompile.kernels.fp8_linear.supports import GROUP_ROWS, RESERVED
from mlacompile.kernels.launch import Launch

REGISTERS = 240  # of a thread that multiplies: three times 128 threads have 65,536, and the fetching ones 24
BAND_ROWS = 2048  # of x that all programs work on at once: 132 tiles of 256 × 128 are then as wide as high
MOST_PARTS = 16
# What a program takes, in cycles. They only rank tiles (docs/kernels.md).
L2_BYTES = 36  # a cycle and SM: what the best kernels get of tiles that are read again and again
PRODUCTS = 4096  # multiply-adds in FP8 a cycle and SM
TILE_CYCLES = 1500  # first scales, first block, last sums, result
SUM_CYCLES = 2500
SUM_BYTES = 3200  # a cycle, of partial results that are written and read again, in L2


@dataclass(frozen=True)
class HopperTiles:
    """block_m: rows of x, 128 or 256. block_n: rows of the weight, up to 128. parts: of K, each an item of its own."""

    block_m: int
    block_n: int
    parts: int = 1

    @property
    def stages(self) -> int:
        """As many as fit beside 64 rows of the result for each group of warps."""
        room = SMEM - RESERVED - 2 * GROUP_ROWS * self.block_n * 2
        return room // ((self.block_m + self.block_n) * SCALE_GROUP)

    @property
    def band(self) -> int:
        """Tiles along M that are taken one under the other."""
        return BAND_ROWS // self.block_m

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.parts}"


TILES = (HopperTiles(256, 128), HopperTiles(128, 128), HopperTiles(128, 64))


@lru_cache(maxsize=1024)
def choose_hopper_tiles(m: int, n: int, k: int, sms: int) -> HopperTiles:
    """The tiles, and parts of K, with which m rows by [n, k] should end soonest."""
    blocks = scale_groups(k)
    parts = {filled_parts(blocks, parts) for parts in range(1, MOST_PARTS + 1)}
    every = [HopperTiles(tile.block_m, tile.block_n, each) for tile in TILES for each in sorted(parts)]
    return min(every, key=lambda tiles: cycles(tiles, m, n, k, sms))


def cycles(tiles: HopperTiles, m: int, n: int, k: int, sms: int) -> float:
    """What a product of m rows by [n, k] takes by reckoning."""
    block = max(
        tiles.block_m * tiles.block_n * SCALE_GROUP / PRODUCTS,
        (tiles.block_m + tiles.block_n) * SCALE_GROUP / L2_BYTES,
    )
    items = -(-m // tiles.block_m) * -(-n // tiles.block_n) * tiles.parts
    taken = -(-items // sms) * (-(-scale_groups(k) // tiles.parts) * block + TILE_CYCLES)
    return taken if tiles.parts == 1 else taken + SUM_CYCLES + tiles.parts * m * n * 8 / SUM_BYTES


def fp8_linear_hopper(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype,
    tiles: HopperTiles | None = None,
) -> Tensor:  # fmt: skip
    """The op by the Hopper kernel, for inputs that ``hopper_reasons`` has nothing against."""
    x, weight = aligned(x), aligned(weight)
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    for launch in hopper_launches(x, x_descale, weight, weight_descale, out, tiles):
        launch()
    return out


def hopper_launches(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, out: Tensor,
    tiles: HopperTiles | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of the kernel, and of the sum if K is divided. Meta tensors do, to compile without a GPU."""
    from mlacompile.kernels.fp8_linear.hopper import _fp8_hopper_kernel

    (m, k), n = x.shape, weight.shape[0]
    sms = sms_of(x.device)
    tiles = tiles or choose_hopper_tiles(m, n, k, sms)
    parts = filled_parts(scale_groups(k), tiles.parts)
    blocks_a_part = -(-scale_groups(k) // parts)
    partial = x.new_empty((parts, m, n), dtype=torch.float32) if parts > 1 else None
    arguments = {
        "d_x": descriptor(x, tiles.block_m, SCALE_GROUP), "p_x_descale": x_descale,
        "d_w": descriptor(weight, tiles.block_n, SCALE_GROUP), "p_descale": weight_descale,
        "d_out": descriptor(out, GROUP_ROWS, tiles.block_n), "p_part": partial, "M": m, "N": n, "K": k,
        "stride_xsm": x_descale.stride(0), "stride_xsk": x_descale.stride(1), "stride_sn": weight_descale.stride(0),
        "blocks_a_part": blocks_a_part, "parts": parts, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "STAGES": tiles.stages, "BAND": tiles.band, "REGS": REGISTERS,
    }  # fmt: skip
    items = -(-m // tiles.block_m) * -(-n // tiles.block_n) * parts
    launches = [Launch(_fp8_hopper_kernel, (min(items, sms),), arguments, {"num_warps": 4})]
    return launches if partial is None else [*launches, sum_launch(partial, out)]


def aligned(t: Tensor) -> Tensor:
    """t where TMA can address it. Graphs choose a kernel before there is memory to look at; then it is copied."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks of so many rows and columns, in lines of up to 128 bytes as ``wgmma`` reads them."""
    bits = 8 * t.itemsize
    apart = t.stride(0) if t.stride(0) * t.itemsize % 16 == 0 else 128 // bits  # of a single row it may be anything
    layout = NVMMASharedLayout(swizzle_byte_width=min(128, columns * t.itemsize), element_bitwidth=bits, rank=2)
    return TensorDescriptor(t, list(t.shape), [apart, 1], [rows, columns], layout)
