"""Chooses tiles for the Hopper kernel of ``fp8_linear`` for few rows. Needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from mlacompile.geometry import SCALE_GROUP, filled_parts, scale_groups
from mlacompile.kernels.device import SMEM, sms_of
from mlacompile.kernels.fp8_linear.supports import GROUP_ROWS, RESERVED

COLUMNS = 128  # of a block of the result
STRIPS = (0, 16, 32, 64)  # rows
NARROWEST = 16  # columns of a strip that a group of warps can have: 32 bytes of the result leave in one piece
MOST_PARTS = 16
# What 90 times say that were measured on an H200 (docs/kernels.md), in KB a microsecond and in microseconds.
MEMORY = 3800
CACHE = 7400  # L2, all programs together
PROGRAM = 69
BEGIN = 3.4  # a program, before its first product
OTHERS = 0.05  # of what is not the limit; it decides between tiles for which that is the same
SUM = 0.7  # of parts, and …
SUM_MB = 0.95  # … for each MB of them


@dataclass(frozen=True)
class StreamTiles:
    """block_m: 64 or 128, no fewer than rows of x. blocks: of 128 rows of the weight, 1 or 2, with 128 rows of x 1.
    strip: rows of the weight beside them, of ``STRIPS``. parts: of K."""

    block_m: int
    blocks: int
    strip: int = 0
    parts: int = 1

    @property
    def width(self) -> int:
        """Rows of the weight that a tile has."""
        return self.blocks * COLUMNS + self.strip

    @property
    def columns(self) -> int:
        """Of the blocks, those that one of the two groups of warps has: half of them, or with 128 rows all."""
        return self.blocks * COLUMNS * self.block_m // (2 * GROUP_ROWS)

    @property
    def strip_columns(self) -> int:
        """Of the strip, as above."""
        return self.strip * self.block_m // (2 * GROUP_ROWS)

    @property
    def stages(self) -> int:
        """As many as fit, beside what leaves in 16 bits."""
        room = SMEM - RESERVED - (self.block_m * self.width * 2 if self.parts == 1 else 0)
        return room // ((self.block_m + self.width) * SCALE_GROUP)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.blocks}x{self.strip}x{self.parts}"


@lru_cache(maxsize=1024)  # a model in eager mode asks for every product of every step
def choose_stream_tiles(m: int, n: int, k: int, sms: int, parts: int | None = None) -> StreamTiles:
    """The tiles, for up to 128 rows, with which m rows by [n, k] should end soonest; with so many parts of K if that is
    given."""
    block_m = GROUP_ROWS if m <= GROUP_ROWS else 2 * GROUP_ROWS
    some = {filled_parts(scale_groups(k), each) for each in range(1, MOST_PARTS + 1)} if parts is None else {parts}
    every = [
        StreamTiles(block_m, blocks, strip, each)
        for blocks in (1, 2)[: 2 * GROUP_ROWS // block_m]
        for strip in STRIPS
        for each in sorted(some)
    ]
    able = [tiles for tiles in every if tiles.strip == 0 or tiles.strip_columns >= NARROWEST]
    return min(able, key=lambda tiles: microseconds(tiles, m, n, k, sms))


def microseconds(tiles: StreamTiles, m: int, n: int, k: int, sms: int) -> float:
    """What a product of m rows by [n, k] takes by reckoning; it only ranks tiles."""
    programs = -(-n // tiles.width) * tiles.parts
    read = -(-scale_groups(k) // tiles.parts) * (tiles.block_m + tiles.width) * SCALE_GROUP / 1e3  # by a program, KB
    limits = (
        n * k / 1e3 / MEMORY,
        programs * read / CACHE,
        -(-programs // sms) * (read / PROGRAM + BEGIN),
    )
    reading = max(limits) + OTHERS * sum(limits)
    return reading if tiles.parts == 1 else reading + SUM + SUM_MB * tiles.parts * m * n * 4 / 1e6


def stream_parts(m: int, n: int, k: int, device: torch.device) -> int:
    """In how many parts of K the kernel multiplies m rows by [n, k]."""
    return choose_stream_tiles(m, n, k, sms_of(device)).parts
