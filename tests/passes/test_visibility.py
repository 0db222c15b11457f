"""Masks become ranges and causality only when that is what they say: what is emitted shows exactly the tokens of
the mask.

What the emitted arguments show is read off by ``visible_tokens``, the definition that ``mla_decode`` itself uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.ops.mla_decode import visible_tokens
from mlacompile.passes.emit import Emitter
from mlacompile.passes.recognize import Attention
from mlacompile.passes.visibility import Visibility, emit_arguments, understand

B, T = 3, 12
Mask = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Read:
    """What was understood of a mask, which tokens ``[B, S, T]`` that shows, and the mask that is left."""

    seen: Visibility
    shows: Tensor
    mask: Tensor | None
    start: Tensor | None
    length: Tensor | None
    causal: bool


def read(mask: Mask, rows: Tensor, one: Tensor, queries: int, *, causal: bool = False, dynamic: bool = False) -> Read:
    """Trace a mask as a graph has it, understand it, and evaluate the arguments that are emitted."""
    q, k = torch.zeros(B, 2, queries, 4), torch.zeros(B, 2, T, 4)

    def with_queries(q: Tensor, k: Tensor, rows: Tensor, one: Tensor) -> Tensor:
        return torch.ops.mlacompile.attention(q, k, k, mask(rows, one), causal, 1.0, False)

    gm = make_fx(with_queries, tracing_mode="symbolic" if dynamic else "fake")(q, k, rows, one)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.attention.default)
    seen = understand(Attention.of(node))
    emitted = emit_arguments(Emitter(node), seen, node.args[0])
    gm.graph.output_node().args = ((emitted.mask, emitted.start, emitted.length),)
    gm.recompile()
    left, start, length = gm(q, k, rows, one)
    for bound in (start, length):
        if bound is not None:
            assert (bound.dtype, bound.shape) == (torch.int32, (B,))
            assert bound.is_contiguous()
    boolean = left if left is None or left.dtype is torch.bool else left == 0
    shown = visible_tokens(
        boolean, start, length, emitted.causal, queries=queries, tokens=T, device=torch.device("cpu")
    )
    shows = torch.ones(B, queries, T, dtype=torch.bool) if shown is None else shown.expand(B, queries, T)
    return Read(seen, shows, left, start, length, emitted.causal)


def wanted(mask: Mask, rows: Tensor, one: Tensor, queries: int) -> Tensor:
    value = mask(rows, one)
    value = value if value.dtype is torch.bool else value == 0
    while value.dim() < 4:
        value = value.unsqueeze(0)
    return value[:, 0].expand(B, queries, T)


INPUTS = st.tuples(
    st.lists(st.integers(-3, T + 3), min_size=B, max_size=B),
    st.lists(st.integers(-3, T + 3), min_size=1, max_size=1),
    st.integers(1, 5),
)
COMPARE = [torch.le, torch.lt, torch.ge, torch.gt]
TERMS = st.lists(
    st.tuples(
        st.sampled_from(COMPARE),
        st.booleans(),  # the token stands on the right
        st.booleans(),  # negated
        st.booleans(),  # moves on with the query
        st.booleans(),  # one number for all rows
        st.integers(-2, 2),
        st.sampled_from(["plain", "add", "start", "slice"]),
    ),
    min_size=1,
    max_size=4,
)


def compose(terms: list[tuple[object, ...]], queries: int, joined: Callable[..., Tensor], narrow: bool) -> Mask:
    """Comparisons of the token's index with a number, plus the query's index or not, joined by "and"."""

    def index(kind: str, count: int, shift: int) -> Tensor:
        if kind == "slice":
            return torch.arange(count + 5)[5 : count + 5] - 5 + shift
        return (
            torch.arange(shift, count + shift)
            if kind == "start"
            else torch.arange(count) + (shift if kind == "add" else 0)
        )

    def mask(rows: Tensor, one: Tensor) -> Tensor:
        out = None
        for compare, swap, negated, diagonal, shared, shift, kind in terms:
            token = index(str(kind), T, int(shift))[None, None, None, :]  # type: ignore[call-overload]
            bound = one if shared else rows.view(B, 1, 1, 1)
            bound = bound.to(torch.int32) if narrow and not diagonal else bound
            if diagonal:
                bound = bound + torch.arange(queries)[None, None, :, None]
            term = compare(bound, token) if swap else compare(token, bound)  # type: ignore[operator]
            term = term.logical_not() if negated else term
            out = term if out is None else joined(out, term)
        return out.expand(B, 1, queries, T)  # type: ignore[union-attr]

    return mask


@given(TERMS, INPUTS, st.sampled_from([torch.logical_and, torch.bitwise_and]), st.booleans())
@settings(max_examples=120, deadline=None)
def test_comparisons_are_understood_and_show_the_same_tokens(
    terms: list[tuple[object, ...]],
    values: tuple[list[int], list[int], int],
    joined: Callable[..., Tensor],
    narrow: bool,
) -> None:
    rows, one, queries = torch.tensor(values[0]), torch.tensor(values[1]), values[2]
    mask = compose(terms, queries, joined, narrow)
    found = read(mask, rows, one, queries)
    assert found.seen.masks == (), "every part is a bound"
    assert torch.equal(found.shows, wanted(mask, rows, one, queries))
    uppers = {bool(t[3]) for t in terms if (t[0] in COMPARE[:2]) is (bool(t[1]) is bool(t[2]))}
    lowers = {bool(t[3]) for t in terms if (t[0] in COMPARE[:2]) is not (bool(t[1]) is bool(t[2]))}
    if queries == 1 or (uppers in (set(), {True}, {False}) and True not in lowers):
        assert found.mask is None, "nothing is materialized"


def triangle(rows: Tensor, one: Tensor) -> Tensor:
    return (torch.arange(T) <= torch.arange(4)[:, None] + one)[None, None].expand(B, -1, -1, -1)


def test_a_static_cache_is_causal_up_to_what_is_written() -> None:
    found = read(triangle, torch.zeros(B), torch.tensor([5]), 4)
    assert (found.mask, found.start, found.causal) == (None, None, True)
    assert found.length is not None
    assert found.length.tolist() == [9] * B
    assert found.seen.describe() == "causal"
    assert not found.seen.whole


def test_padding_stays_a_mask_of_tokens_beside_the_length() -> None:
    def mask(rows: Tensor, one: Tensor) -> Tensor:
        keep = torch.arange(T)[None] >= rows[:, None]
        batch, token = torch.arange(B)[:, None, None, None], torch.arange(T)[None, None, None, :]
        return torch.ones((), dtype=torch.bool) & triangle(rows, one) & keep[batch, token]

    rows, one = torch.tensor([0, 2, 5]), torch.tensor([6])
    found = read(mask, rows, one, 4)
    assert torch.equal(found.shows, wanted(mask, rows, one, 4))
    assert found.mask is not None
    assert found.mask.shape == (B, 1, T)
    assert found.causal
    assert found.seen.describe() == "causal, padding"


def window(queries: int) -> Mask:
    def mask(rows: Tensor, one: Tensor) -> Tensor:
        query = torch.arange(queries)[:, None] + one
        return ((torch.arange(T) <= query) & (torch.arange(T) > query - 3))[None, None]

    return mask


def test_a_sliding_window_has_its_start_and_keeps_its_mask() -> None:
    rows, one = torch.zeros(B), torch.tensor([6])
    found = read(window(4), rows, one, 4)
    assert torch.equal(found.shows, wanted(window(4), rows, one, 4))
    assert found.start is not None
    assert found.start.tolist() == [4] * B
    assert found.seen.describe() == "causal, sliding window"
    assert found.seen.opaque
    single = read(window(1), rows, one, 1)
    assert single.mask is None, "with one query a window is a range"
    assert torch.equal(single.shows, wanted(window(1), rows, one, 1))


LOW = torch.finfo(torch.float32).min
TRIANGLES: dict[str, Callable[[Tensor], Tensor]] = {
    "tril": lambda one: torch.ones(T, T, dtype=torch.bool).tril(),
    "tril-of-floats": lambda one: torch.ones(T, T).tril().bool(),
    "not-triu": lambda one: ~torch.ones(T, T, dtype=torch.bool).triu(1),
    "added-triu": lambda one: torch.full((T, T), float("-inf")).triu(1),
    "added-where": lambda one: torch.where(torch.arange(T) <= torch.arange(T)[:, None], 0.0, LOW),
    "added-where-not": lambda one: torch.where(torch.arange(T) > torch.arange(T)[:, None], float("-inf"), 0.0),
    "filled": lambda one: torch.zeros(T, T).masked_fill(torch.arange(T) > torch.arange(T)[:, None], LOW),
    "differences": lambda one: torch.arange(T)[:, None] - torch.arange(T) >= 0,
    "transposed": lambda one: (torch.arange(T)[:, None] <= torch.arange(T)).t(),
}


@pytest.mark.parametrize("name", TRIANGLES)
def test_a_triangle_over_all_tokens_needs_no_arguments(name: str) -> None:
    def mask(rows: Tensor, one: Tensor) -> Tensor:
        return TRIANGLES[name](one)[None, None].expand(B, 1, T, T)

    found = read(mask, torch.zeros(B), torch.zeros(1), T)
    assert (found.mask, found.start, found.length, found.causal) == (None, None, None, True)
    assert found.seen.whole
    assert torch.equal(found.shows, wanted(mask, torch.zeros(B), torch.zeros(1), T))


@pytest.mark.parametrize("queries", [1, 4, T])
def test_the_flag_of_attention_counts_from_the_first_token(queries: int) -> None:
    q, k = torch.zeros(B, 2, queries, 4), torch.zeros(B, 2, T, 4)
    gm = make_fx(lambda q, k: torch.ops.mlacompile.attention(q, k, k, None, True, 1.0, False), tracing_mode="fake")(
        q, k
    )
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.attention.default)
    seen = understand(Attention.of(node))
    found = emit_arguments(Emitter(node), seen, node.args[0])
    gm.graph.output_node().args = ((found.length,),)
    gm.recompile()
    (length,) = gm(q, k)
    shows = visible_tokens(None, None, length, found.causal, queries=queries, tokens=T, device=torch.device("cpu"))
    assert shows is not None
    assert torch.equal(shows.expand(B, queries, T)[0], torch.ones(queries, T, dtype=torch.bool).tril())
    assert seen.whole is (queries == T)


def before(bound: Tensor) -> Tensor:
    """Tokens below ``bound [B]``, as a mask ``[B, 1, 1, T]``."""
    return (torch.arange(T) < bound[:, None])[:, None, None]


def up_to(bound: Tensor) -> Tensor:
    return (torch.arange(T) <= bound[:, None])[:, None, None]


STAY: dict[str, Mask] = {
    "or": lambda rows, one: before(rows) | (torch.arange(T) > one),
    "xor": lambda rows, one: before(rows) ^ before(one),
    "equal": lambda rows, one: (torch.arange(T) == rows[:, None])[:, None, None],
    "not-equal": lambda rows, one: (torch.arange(T) != rows[:, None])[:, None, None],
    "every-second": lambda rows, one: torch.arange(0, 2 * T, 2) < rows[:, None, None, None],
    "backwards": lambda rows, one: torch.arange(T).flip(0) < rows[:, None, None, None],
    "doubled": lambda rows, one: torch.arange(T) * 2 < rows[:, None, None, None],
    "bound-of-every-token": lambda rows, one: torch.arange(T) < torch.arange(T).flip(0) + rows[:, None, None, None],
    "fraction": lambda rows, one: before(rows / 2),
    "looked-up": lambda rows, one: before(rows)[..., torch.tensor([0, 0, *range(2, T)])],
    "and-with-looked-up": lambda rows, one: before(one) & (rows[:, None, None, None] > torch.arange(T) % 3),
    "backwards-in-the-query": lambda rows, one: torch.arange(T) < one - torch.arange(4)[:, None],
    "twice-the-query": lambda rows, one: torch.arange(T) < one + torch.arange(0, 8, 2)[:, None],
    "query-looked-up": lambda rows, one: torch.arange(T) < one + torch.tensor([0, 3, 1, 2])[:, None],
    "wrapping-int32": lambda rows, one: (
        torch.arange(T, dtype=torch.int32) < torch.arange(4, dtype=torch.int32)[:, None] + one.to(torch.int32)
    ),
    "banded": lambda rows, one: torch.ones(T, T, dtype=torch.bool).tril(2).triu(-1)[:4],
    "added-small": lambda rows, one: torch.where(before(rows), 0.0, -3.0),
    "per-pair": lambda rows, one: (torch.arange(T) + torch.arange(4)[:, None]) % 3 < one,
}


@pytest.mark.parametrize("name", STAY)
@pytest.mark.parametrize("values", [([5, 0, T], [7]), ([3, 1, 11], [2]), ([-1, 6, 13], [0])], ids=str)
def test_what_is_not_a_range_stays_a_mask_or_is_right(name: str, values: tuple[list[int], list[int]]) -> None:
    rows, one = (torch.tensor(v) for v in values)
    found = read(STAY[name], rows, one, 4)
    assert torch.equal(found.shows, wanted(STAY[name], rows, one, 4)), "taken for a range it is not"
    assert found.mask is not None


SPECIAL: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "fractions": (before, torch.tensor([3.5, 0.2, 7.0])),
    "not-a-number": (before, torch.tensor([torch.nan, 1.0, 2.0])),
    "huge": (before, torch.tensor([2**40, 2**31, 2**32 + 3])),
    "hugely-negative": (lambda x: ~up_to(x), -torch.tensor([2**40, 2**31, 2**33])),
    "far": (lambda x: (torch.arange(T) > x[:, None])[:, None, None], torch.tensor([2**40, 2**31 - 1, 4])),
    "largest": (up_to, torch.tensor([2**63 - 1, 2**31 - 1, 4])),
    "largest-int32": (up_to, torch.tensor([2**31 - 1, -(2**31), 4], dtype=torch.int32)),
    "bytes": (up_to, torch.tensor([127, 3, 0], dtype=torch.int8)),
    "unsigned": (up_to, torch.tensor([255, 3, 0], dtype=torch.uint8)),
    "booleans": (up_to, torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_bounds_of_other_dtypes_and_sizes_stay_masks_or_are_right(name: str) -> None:
    mask, rows = SPECIAL[name]
    found = read(lambda x, one: mask(x), rows, torch.tensor([4]), 1)
    assert torch.equal(found.shows, wanted(lambda x, one: mask(x), rows, torch.tensor([4]), 1))


@pytest.mark.parametrize("queries", [2, 5])
def test_symbolic_lengths_are_understood(queries: int) -> None:
    """As a growing cache has it: the past is as long as the keys, less the queries."""
    q, k = torch.zeros(B, 2, queries, 4), torch.zeros(B, 2, T, 4)

    def attend(q: Tensor, past: Tensor, k: Tensor) -> Tensor:
        whole = torch.cat((past, k), 2)
        query = torch.arange(q.shape[2]) + past.shape[2]
        mask = torch.arange(whole.shape[2])[None, :] <= query[:, None]
        return torch.ops.mlacompile.attention(q, whole, whole, mask[None, None], False, 1.0, False)

    gm = make_fx(attend, tracing_mode="symbolic")(q, k[:, :, queries:], k[:, :, :queries])
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.attention.default)
    seen = understand(Attention.of(node))
    found = emit_arguments(Emitter(node), seen, node.args[0])
    assert (found.mask, found.start, found.causal) == (None, None, True)
    gm.graph.output_node().args = ((found.length,),)
    gm.recompile()
    (length,) = gm(q, k[:, :, queries:], k[:, :, :queries])
    assert length is None or length.tolist() == [T] * B


def packed(rows: Tensor, one: Tensor) -> Tensor:
    """Causal within a packed sequence, of which positions without a jump show there is one."""
    position = torch.arange(T).unsqueeze(0)
    sequence = (torch.diff(position, prepend=position[:, :1] - 1) != 1).cumsum(-1)
    same = sequence[:, :, None] == sequence[:, None, :]
    return (same & (position[:, None, :] <= position[:, :, None])).unsqueeze(1).expand(B, 1, T, T)


def test_a_mask_of_nothing_but_sizes_is_computed_and_found_causal() -> None:
    rows, one = torch.zeros(B, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    found = read(packed, rows, one, T)
    assert found.seen.whole
    assert found.seen.causal
    assert found.mask is found.start is found.length is None
    assert torch.equal(found.shows, wanted(packed, rows, one, T))


@settings(max_examples=30, deadline=None)
@given(queries=st.integers(1, 6), first=st.integers(-8, 9), width=st.integers(1, 12))
def test_a_known_band_shows_the_same_tokens(queries: int, first: int, width: int) -> None:
    def band(rows: Tensor, one: Tensor) -> Tensor:
        distance = torch.arange(T).float() - torch.arange(queries).float().unsqueeze(1) - first
        return ((distance + 0.5).abs() < width).unsqueeze(0).expand(B, 1, queries, T)

    rows, one = torch.zeros(B, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    expected = wanted(band, rows, one, queries)
    found = read(band, rows, one, queries)
    assert torch.equal(found.shows, expected)
    if bool(expected.any(-1).all()):
        assert "opaque" not in found.seen.describe()


@pytest.mark.parametrize("name", ["checkered", "drawn", "differs by row"])
def test_a_known_mask_that_is_no_band_stays_a_mask(name: str) -> None:
    masks: dict[str, Mask] = {
        "checkered": lambda rows, one: ((torch.arange(4).unsqueeze(1) + torch.arange(T)) % 2 == 0).expand(B, 1, 4, T),
        "drawn": lambda rows, one: torch.rand(4, T).expand(B, 1, 4, T) > -1,  # true everywhere, this once
        "differs by row": lambda rows, one: torch.arange(T) <= torch.arange(B).view(B, 1, 1, 1) + torch.zeros(4, 1),
    }
    rows, one = torch.zeros(B, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    found = read(masks[name], rows, one, 4)
    assert found.seen.describe() == "an opaque mask"
    assert found.mask is not None
