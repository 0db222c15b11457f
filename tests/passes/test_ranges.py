"""A mask becomes a range only when it is one: start and length must show exactly the tokens that the mask shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.passes.emit import Emitter
from mlacompile.passes.ranges import bounds_of, emit_range

T, B = 12, 3
Mask = Callable[[Tensor, Tensor], Tensor]


def traced(mask: Mask, *inputs: Tensor) -> tuple[GraphModule, torch.fx.Node]:
    gm = make_fx(mask, tracing_mode="fake")(*inputs)
    end = gm.graph.output_node()
    return gm, end.args[0]  # type: ignore[return-value]


def as_range(mask: Mask, *inputs: Tensor) -> Tensor | None:
    """The tokens ``[B, T]`` that the emitted start and length show, or None when the mask stays a mask."""
    gm, node = traced(mask, *inputs)
    bounds = bounds_of(node)
    if bounds is None:
        return None
    end = gm.graph.output_node()
    end.args = (emit_range(Emitter(end), bounds, B),)
    gm.recompile()
    start, length = gm(*inputs)
    token, seen = torch.arange(T), torch.ones(B, T, dtype=torch.bool)
    for bound, visible in ((start, torch.ge), (length, torch.lt)):
        if bound is not None:
            assert bound.dtype == torch.int32
            assert bound.shape == (B,)
            assert bound.is_contiguous()
            seen &= visible(token, bound[:, None])
    return seen


INPUTS = st.tuples(
    st.lists(st.integers(-3, T + 3), min_size=B, max_size=B), st.lists(st.integers(-3, T + 3), min_size=1, max_size=1)
)
COMPARE = [torch.le, torch.lt, torch.ge, torch.gt]


@st.composite
def ranges(draw: st.DrawFn) -> Mask:
    """Comparisons of the token's index with a number a row or with one for all, joined by "and"."""
    terms = draw(
        st.lists(
            st.tuples(
                st.sampled_from(COMPARE),
                st.booleans(),
                st.booleans(),
                st.integers(-2, 2),
                st.sampled_from(["plain", "add", "start"]),
            ),
            min_size=1,
            max_size=4,
        )
    )
    joined = draw(st.sampled_from([torch.logical_and, torch.bitwise_and]))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))

    def mask(rows: Tensor, one: Tensor) -> Tensor:
        out = None
        for compare, swap, shared, shift, spelling in terms:
            token = torch.arange(shift, T + shift) if spelling == "start" else torch.arange(T)
            token = (token + shift if spelling == "add" else token)[None, None, None, :]
            bound = (one.expand(B) if shared else rows).to(dtype).view(B, 1, 1, 1)
            bound = one.to(dtype) if shared else bound
            term = compare(bound, token) if swap else compare(token, bound)
            out = term if out is None else joined(out, term)
        return out.expand(B, 1, 1, T)  # type: ignore[union-attr]

    return mask


@given(ranges(), INPUTS)
@settings(max_examples=60, deadline=None)
def test_a_range_is_found_and_shows_the_same_tokens(mask: Mask, values: tuple[list[int], list[int]]) -> None:
    rows, one = (torch.tensor(v) for v in values)
    seen = as_range(mask, rows, one)
    assert seen is not None
    assert torch.equal(seen, mask(rows, one)[:, 0, 0])


def before(bound: Tensor) -> Tensor:
    """Tokens below ``bound [B]``, as a mask ``[B, 1, 1, T]``."""
    return (torch.arange(T) < bound[:, None])[:, None, None]


def up_to(bound: Tensor) -> Tensor:
    return (torch.arange(T) <= bound[:, None])[:, None, None]


STAY: dict[str, Mask] = {
    "or": lambda rows, one: before(rows) | (torch.arange(T) > one),
    "xor": lambda rows, one: before(rows) ^ before(one),
    "not": lambda rows, one: ~before(rows),
    "equal": lambda rows, one: (torch.arange(T) == rows[:, None])[:, None, None],
    "not-equal": lambda rows, one: (torch.arange(T) != rows[:, None])[:, None, None],
    "every-second": lambda rows, one: torch.arange(0, 2 * T, 2) < rows[:, None],
    "backwards": lambda rows, one: torch.arange(T).flip(0) < rows[:, None],
    "doubled": lambda rows, one: torch.arange(T) * 2 < rows[:, None],
    "added-twice": lambda rows, one: torch.add(torch.arange(T), 1, alpha=2) < rows[:, None],
    "bound-of-every-token": lambda rows, one: torch.arange(T) < torch.arange(T).flip(0) + rows[:, None],
    "fraction": lambda rows, one: before(rows / 2),
    "no-token": lambda rows, one: (rows[:, None] > -9).expand(B, T),
    "looked-up": lambda rows, one: before(rows)[..., torch.tensor([0, 0, *range(2, T)])],
    "and-with-looked-up": lambda rows, one: before(one) & (rows[:, None, None, None] > torch.arange(T) % 3),
}


@pytest.mark.parametrize("name", STAY)
@pytest.mark.parametrize("values", [([5, 0, T], [7]), ([3, 1, 11], [2]), ([-1, 6, 13], [0])], ids=str)
def test_what_is_not_a_range_stays_a_mask_or_is_right(name: str, values: tuple[list[int], list[int]]) -> None:
    rows, one = (torch.tensor(v) for v in values)
    seen = as_range(STAY[name], rows, one)
    if seen is not None:
        want = STAY[name](rows, one)
        assert torch.equal(seen, want.reshape(B, T)), "taken for a range it is not"


SPECIAL: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "fractions": (before, torch.tensor([3.5, 0.2, 7.0])),
    "not-a-number": (before, torch.tensor([torch.nan, 1.0, 2.0])),
    "huge": (before, torch.tensor([2**40, 2**31, 2**32 + 3])),
    "hugely-negative": (lambda x: ~up_to(x), -torch.tensor([2**40, 2**31, 2**33])),
    "first-of-a-far-token": (
        lambda x: (torch.arange(T) > x[:, None])[:, None, None],
        torch.tensor([2**40, 2**31 - 1, 4]),
    ),
    "largest": (up_to, torch.tensor([2**63 - 1, 2**31 - 1, 4])),
    "largest-int32": (up_to, torch.tensor([2**31 - 1, -(2**31), 4], dtype=torch.int32)),
    "bytes": (up_to, torch.tensor([127, 3, 0], dtype=torch.int8)),
    "unsigned": (up_to, torch.tensor([255, 3, 0], dtype=torch.uint8)),
    "booleans": (up_to, torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_bounds_of_other_dtypes_and_sizes_stay_masks_or_are_right(name: str) -> None:
    mask, rows = SPECIAL[name]
    seen = as_range(lambda x, one: mask(x), rows, torch.tensor([4]))
    if seen is not None:
        assert torch.equal(seen, mask(rows)[:, 0, 0])
