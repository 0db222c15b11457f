"""How to cut one ``mla_decode`` into programs: tiles, warps, stages and splits, from shapes and the device alone.

Pure Python, no Triton: it runs while a CUDA graph is captured and may not look at any tensor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a plan needs to know about a GPU. smem: bytes of shared memory that one program may use."""

    capability: tuple[int, int] = (9, 0)
    sm_count: int = 132
    smem: int = 232_448


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
    stages = max(plan.num_stages - (shape.itemsize == 4), 1)
    return plan.block_h * width + stages * plan.block_n * width + plan.block_h * plan.block_n * shape.itemsize + 2048


def row_tiles(plan: Plan, shape: Shape) -> int:
    return -(-shape.rows // plan.block_h)


def choose_plan(shape: Shape, device: Device) -> Plan:
    """The plan for a call."""
    tiles = _tiles(shape, device)
    return Plan(**{**tiles.__dict__, "splits": choose_splits(tiles, shape, device), "pdl": device.capability >= (9, 0)})


def _tiles(shape: Shape, device: Device) -> Plan:
    hopper = device.capability[0] == 9
    if shape.itemsize == 4:
        candidates = [Plan(16, 32, 4, 2), Plan(16, 16, 4, 2), Plan(16, 16, 4, 1)]
    elif hopper and (shape.rows > 16 or shape.descriptors):
        # wgmma needs 64 rows. Even mostly empty ones keep up with memory, as TMA spares the threads the copying.
        candidates = [Plan(64, 64, 8, 2, tma=shape.descriptors, wide=True), Plan(64, 32, 8, 2, tma=shape.descriptors, wide=True)]
    elif shape.rows > 16:
        candidates = [Plan(32, 32, 8, 2), Plan(16, 32, 4, 2)]
    else:
        candidates = [Plan(16, 64, 4, 2), Plan(16, 32, 4, 2)]
    candidates.append(Plan(16, 16, 4, 2))
    for plan in candidates:
        if shared_memory(plan, shape) <= device.smem:
            return plan
    return Plan(16, 16, 4, 1)


def choose_splits(tiles: Plan, shape: Shape, device: Device) -> int:
    """Enough splits to give every SM one program, as long as each keeps a few tiles to itself.

    A split costs a round trip of float32 partials, so none is made where batch and row tiles fill the SMs already; two or
    more waves are left as they are, because a tail of a wave costs less than the combine.
    """
    programs = shape.batch * row_tiles(tiles, shape)
    n_tiles = -(-shape.tokens // tiles.block_n)
    wanted = max(device.sm_count // programs, 1)
    return max(1, min(wanted, -(-n_tiles // 2), 128))
