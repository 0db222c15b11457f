"""How the Hopper kernels share blocks among programs: the planner run as Python, for random lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the planner is written in Gluon, which Triton brings")
from mlacompile.kernels.mla_decode import hopper_plan
from tests.kernels import gluon_in_python
from tests.kernels.registers_in_python import Pointer, made

BLOCK, LIGHT, HEAVY = hopper_plan.BLOCK.value, hopper_plan.LIGHT.value, hopper_plan.HEAVY.value
LIGHT_FROM = 10 * BLOCK  # tokens

tokens = st.one_of(st.integers(0, 3 * BLOCK), st.integers(0, 20 * BLOCK))
alike = st.builds(lambda n, count: [n] * count, tokens, st.integers(1, 40))
batches = st.one_of(st.lists(tokens, min_size=1, max_size=80), alike)


def planned(lengths: list[int], parts: int, overhead: int, weighed: bool) -> tuple[list[list[tuple[Any, ...]]], int]:
    """Of every program its items, as (row, first block, blocks, parts of the row if it begins here), and the share."""
    p_length = Pointer(np.array(lengths, np.int32))
    batch, most = len(lengths), 20 * BLOCK
    chunk = 1 if batch == 1 else 32 if len(lengths) % 2 else 64  # rows that are looked at together, or in rounds
    found = []
    for part in range(parts):
        share, imaginary, row, position = hopper_plan._plan(  # type: ignore[operator]
            None, p_length, batch, most, made(part), made(parts), 2, overhead, chunk, batch > chunk, LIGHT_FROM,
            weighed,
        )  # fmt: skip
        items, todo = [], share
        while row < batch and todo > imaginary:
            _lo, _hi, _end, t, n, skip, rest, taken = hopper_plan._item(  # type: ignore[operator]
                None, p_length, row, position, todo, imaginary, most, LIGHT_FROM, weighed
            )
            assert t == skip * BLOCK
            items.append((int(row), int(skip), int(n), 1 + int((rest + share - 1) // share)))
            todo, row, position = todo - taken, row + 1, 0
        found.append(items)
    return found, int(share)


@pytest.mark.parametrize("weighed", [False, True], ids=["alike", "weighed"])
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=batches, parts=st.integers(1, 12), overhead=st.integers(0, 8))
def test_every_block_is_done_once(
    monkeypatch: pytest.MonkeyPatch, weighed: bool, lengths: list[int], parts: int, overhead: int
) -> None:
    with monkeypatch.context() as patched:
        gluon_in_python.install(patched, [hopper_plan], (1, parts, 1))
        programs, share = planned(lengths, parts, overhead, weighed)
    todo = [max(-(-n // BLOCK), 1) for n in lengths]
    done = [0] * len(lengths)
    shared = [0] * len(lengths)
    said = [0] * len(lengths)
    for items in programs:
        for row, first, count, of_row in items:
            assert count >= 1, "a program would wait for what nobody sends for"
            assert first == done[row], "a block is left out, or done twice"
            done[row] += count
            shared[row] += 1
            if first == 0:
                said[row] = of_row
    assert done == todo
    assert said == shared, "the merge would wait for partials that nobody writes, or miss some"
    weight = [(LIGHT if n >= LIGHT_FROM else HEAVY) if weighed else 1 for n in lengths]
    # Of a row's last block there is one unit, and with every row begun come those that are left of a light one.
    last = LIGHT if weighed else 1
    longest = max(sum((count - 1) * weight[row] + last for row, _, count, _ in items) for items in programs)
    assert longest <= share + 2 * max(weight), "a program does more than its share"


def test_short_rows_weigh_more_where_their_blocks_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with none but short rows gets fewer blocks than one with long ones."""
    gluon_in_python.install(monkeypatch, [hopper_plan], (1, 4, 1))
    lengths = [9 * BLOCK] * 10 + [19 * BLOCK] * 5
    blocks = {}
    for weighed in (False, True):
        programs, _ = planned(lengths, 4, 2, weighed)
        blocks[weighed] = [sum(count for _, _, count, _ in items) for items in programs]
    assert blocks[True][0] < blocks[False][0]
    assert blocks[True][-1] > blocks[False][-1]
