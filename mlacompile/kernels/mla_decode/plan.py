"""How to cut one ``mla_decode`` into programs: tiles, warps, stages and splits, from shapes and the device alone.

Pure Python, no Triton: it runs while a CUDA graph is captured and may not look at any tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlacompile.kernels.device import SMEM

MAX_SPLITS = 64
# What one program and one combine take on a Hopper GPU. They only rank numbers of splits.
START_US = 4.0  # launch, queries, first tile, epilogue
TILE_US = 2.0
COMBINE_US = 3.0
PARTIAL_BYTES_US = 3e6  # partials are written and read mostly in L2


@dataclass(frozen=True)
class Device:
    """What a plan needs to know about a GPU. smem: bytes of shared memory that one program may use."""

    capability: tuple[int, int] = (9, 0)
    sm_count: int = 132
    smem: int = SMEM


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. descriptors: the cache can be described to the TMA unit (strides, alignment, no mask)."""

    batch: int
    heads: int
    queries: int
    tokens: int
    rank: int
    rope: int
    itemsize: int = 2
    descriptors: bool = True

    @property
    def rows(self) -> int:
        return self.heads * self.queries


@dataclass(frozen=True)
class Plan:
    """One launch. wide: spread the warps of the first product over columns (see the kernel). pdl: chain the combine."""

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 1
    tma: bool = False
    wide: bool = False
    pdl: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("tma", "wide", "pdl") if getattr(self, name))
        return f"h{self.block_h}n{self.block_n}w{self.num_warps}s{self.num_stages}x{self.splits}{flags}"


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def block_rank(shape: Shape) -> int:
    """Columns of a latent tile: products want powers of two, at least 16."""
    return max(next_power_of_2(shape.rank), 16)


def block_rope(shape: Shape) -> int:
    return max(next_power_of_2(shape.rope), 16) if shape.rope else 0


def shared_memory(plan: Plan, shape: Shape) -> int:
    """An upper estimate of the bytes of shared memory of the main kernel: queries, stages of cache, P, reductions."""
    width = (block_rank(shape) + block_rope(shape)) * shape.itemsize
    # The pipeliner keeps one tile more where wgmma may still be reading it.
    stages = plan.num_stages if plan.block_h >= 64 else max(plan.num_stages - 1, 1)
    return plan.block_h * width + stages * plan.block_n * width + plan.block_h * plan.block_n * shape.itemsize + 2048


def row_tiles(plan: Plan, shape: Shape) -> int:
    return -(-shape.rows // plan.block_h)


def choose_plan(shape: Shape, device: Device) -> Plan:
    """The plan for a call."""
    tiles = choose_tiles(shape, device)
    return replace(tiles, splits=choose_splits(tiles, shape, device), pdl=device.capability >= (9, 0))


def choose_tiles(shape: Shape, device: Device) -> Plan:
    """Tiles, warps and stages: the first of a list, best first, that fits into shared memory."""
    for plan in _candidates(shape, device):
        if shared_memory(plan, shape) <= device.smem:
            return plan
    return Plan(16, 16, 4, 1)


def _candidates(shape: Shape, device: Device) -> Iterator[Plan]:
    if shape.itemsize == 4:  # products on the CUDA cores, in IEEE float32
        yield from (Plan(16, n, 8, stages) for n, stages in ((32, 3), (16, 3), (16, 2)))
    elif shape.rows <= 16 or (device.capability[0] == 9 and shape.batch * -(-shape.rows // 64) <= 2):
        # Little work for each token: small tiles start sooner, and rows that share tokens find them in L2.
        yield from (Plan(16, n, w, 3) for n, w in ((64, 8), (32, 4)))
    elif device.capability[0] == 9:
        # wgmma needs 64 rows.
        for n, stages in ((64, 4), (64, 3), (64, 2), (32, 3), (32, 2)):
            yield Plan(64, n, 8, stages, tma=shape.descriptors, wide=True)
    else:
        yield Plan(32, 32, 8, 3)
    yield from (Plan(16, n, 4, 3) for n in (32, 16))


def choose_splits(tiles: Plan, shape: Shape, device: Device) -> int:
    """The number of stretches of the context that ends soonest.

    A split gives idle SMs work, but costs each program its start and the combine a read of float32 partials.
    """
    programs = shape.batch * row_tiles(tiles, shape)
    resident = max(min(device.smem // shared_memory(tiles, shape), 4), 1) * device.sm_count
    n_tiles = -(-shape.tokens // tiles.block_n)

    def microseconds(splits: int) -> float:
        waves = -(-programs * splits // resident)
        combine = (
            0.0 if splits == 1 else COMBINE_US + shape.batch * shape.rows * shape.rank * 8 * splits / PARTIAL_BYTES_US
        )
        return waves * (START_US + -(-n_tiles // splits) * TILE_US) + combine

    return min(range(1, min(n_tiles, MAX_SPLITS) + 1), key=microseconds)


#: FP8 products were faster than widening in place where measured, or within 3 %. Tiles of so many rows (query, head)
#: begin and end sooner, but each tile brings the cache from L2 again. So tiles are wide where a batch can hold so many
#: tokens (docs/kernels.md).
NARROW_ROWS = 32
WIDE_FROM = 2**15
MEASURED_ROWS = 128  # at most; twice as many are as much work as twice the tokens

#: Weights of a softmax over so many tokens may be rounded to e4m3: that is 1.5e-2 of the output at 8192 tokens of
#: random data, and less with more. Of fewer they are float16.
COARSE_FROM = 6144

#: What beginning another row costs a program, in blocks: those of wide tiles are soon done. Measured on ragged batches
#: (docs/kernels.md).
OVERHEAD = 4
WIDE_OVERHEAD = 8


#: Blocks that a program can have from which keys of wide tiles with one factor a token are the left operand: each takes
#: less time then, and a row more to begin. Where all weights are float16 it makes no difference (docs/kernels.md).
APART_FROM = 96


@dataclass(frozen=True)
class HopperPlan:
    """One launch of the Hopper kernel: how many programs share the context of each row tile, and how little one takes.

    min_share: blocks of 64 tokens; fewer are not worth a program and its partial. overhead: what beginning another row
    costs a program, in blocks. turned: an FP8 cache is multiplied as it is, by ``hopper_turned.py``. tile_rows: at
    most so many rows (query, head) are a tile, 64, or 32 of those products. coarse_from: of how many tokens on the
    weights of the softmax are FP8 values, too, in tiles of 64. apart: both parts of the queries of such tiles have
    scores of their own, in float16, as they always have with several factors a token.
    """

    parts: int
    min_share: int = 2
    overhead: int = OVERHEAD
    turned: bool = False
    coarse_from: int = COARSE_FROM
    tile_rows: int = 64
    apart: bool = False

    def __str__(self) -> str:
        form = f"-turned{self.tile_rows}" * self.turned + "-apart" * self.apart
        return f"x{self.parts}-min{self.min_share}-over{self.overhead}{form}"


def turned_tile_rows(shape: Shape) -> int:
    """Rows (query, head) of a tile where an FP8 cache is multiplied as it is."""
    wide = shape.batch * shape.tokens * max(shape.rows, MEASURED_ROWS) >= WIDE_FROM * MEASURED_ROWS
    return 64 if wide and shape.rows > NARROW_ROWS else NARROW_ROWS


def parts_apart(shape: Shape, plan: HopperPlan, factors: int) -> bool:
    """Whether both parts of the queries should have scores of their own, in wide tiles with so many factors a token."""
    blocks = shape.batch * -(-shape.tokens // 64)
    return factors > 1 or (shape.tokens >= plan.coarse_from and blocks >= APART_FROM * plan.parts)


def hopper_plan(shape: Shape, device: Device, tile_rows: int = 64) -> HopperPlan:
    """As many parts as fill the chip, and no more than there is work for."""
    tiles = -(-shape.rows // tile_rows)
    min_share = 2
    blocks = shape.batch * -(-shape.tokens // 64)
    parts = max(min(device.sm_count // tiles, -(-blocks // min_share)), 1)
    return HopperPlan(parts, min_share, tile_rows=tile_rows)
