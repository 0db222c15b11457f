"""Plans fit into shared memory, fill the chip and do not cut contexts into splits smaller than a tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlacompile.kernels.mla_decode.plan import (
    MAX_SPLITS,
    Device,
    Shape,
    choose_plan,
    hopper_plan,
    row_tiles,
    shared_memory,
    turned_tile_rows,
)

DEVICES = [
    Device(),
    Device((8, 0), 108, 166_912),
    Device((8, 9), 128, 101_376),
    Device((12, 0), 170, 101_376),
]

shapes = st.builds(
    Shape,
    batch=st.integers(1, 300),
    heads=st.integers(1, 128),
    queries=st.integers(1, 8),
    tokens=st.integers(1, 200_000),
    rank=st.integers(1, 512),
    rope=st.integers(0, 128),
    itemsize=st.sampled_from([2, 4]),
    descriptors=st.booleans(),
)


@given(shape=shapes, device=st.sampled_from(DEVICES))
def test_every_plan_can_be_launched(shape: Shape, device: Device) -> None:
    plan = choose_plan(shape, device)
    assert shared_memory(plan, shape) <= device.smem
    assert plan.block_h in (16, 32, 64)
    assert plan.block_n >= 16
    assert 1 <= plan.splits <= min(MAX_SPLITS, -(-shape.tokens // plan.block_n))
    assert shape.descriptors or not plan.tma
    assert device.capability[0] == 9 or not plan.tma


@pytest.mark.parametrize(("heads", "batch"), [(16, 1), (16, 16), (128, 1), (128, 16), (64, 64)])
def test_splits_fill_the_chip(heads: int, batch: int) -> None:
    shape, device = Shape(batch, heads, 1, 8192, 512, 64), Device()
    plan = choose_plan(shape, device)
    assert batch * row_tiles(plan, shape) * plan.splits >= 0.45 * device.sm_count


@pytest.mark.parametrize(("heads", "batch"), [(16, 128), (128, 64), (128, 128)])
def test_a_full_chip_is_not_split(heads: int, batch: int) -> None:
    assert choose_plan(Shape(batch, heads, 1, 8192, 512, 64), Device()).splits == 1


def test_queries_share_a_tile_with_heads() -> None:
    shape = Shape(16, 16, 4, 4096, 512, 64)
    assert row_tiles(choose_plan(shape, Device()), shape) == 1


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_one_sequence_gets_small_tiles(heads: int) -> None:
    assert choose_plan(Shape(1, heads, 1, 8192, 512, 64), Device()).block_h == 16


@pytest.mark.parametrize(
    ("heads", "queries", "batch", "tokens", "rows"),
    [
        (1, 1, 1, 1, 32),
        (16, 1, 1, 8192, 32),
        (16, 2, 300, 64, 32),
        (16, 2, 300, 8192, 32),
        (33, 1, 1, 8192, 32),
        (16, 4, 3, 8192, 32),
        (16, 4, 4, 8192, 64),
        (64, 1, 1, 8192, 32),
        (128, 1, 1, 32768, 64),
        (128, 1, 1, 30000, 32),
        (128, 1, 1, 65536, 64),
        (128, 1, 16, 8192, 64),
        (128, 2, 64, 8192, 64),
        (128, 2, 1, 8192, 32),
        (128, 8, 1, 8192, 64),
        (128, 512, 1, 1024, 64),
    ],
)
def test_how_many_rows_are_a_tile_of_fp8_products(heads: int, queries: int, batch: int, tokens: int, rows: int) -> None:
    assert turned_tile_rows(Shape(batch, heads, queries, tokens, 512, 64)) == rows


def test_narrow_tiles_get_fewer_parts() -> None:
    shape = Shape(1, 128, 1, 8192, 512, 64)
    assert hopper_plan(shape, Device(), 32).parts == 132 // 4
    assert hopper_plan(shape, Device()).parts == 8192 // 64 // 2


def test_a_hopper_plan_says_so() -> None:
    plan = hopper_plan(Shape(64, 16, 1, 8192, 512, 64), Device())
    assert str(plan) == "x132-min2-over4"
    assert str(replace(plan, turned=True)) == "x132-min2-over4-turned64"
