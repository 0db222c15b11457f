"""Any view that splits, narrows and permutes a weight is found again from the numbers of its elements.

Torch itself is the witness: the view is made on a tensor that holds its own element numbers, and its offset and strides
are what the prober would have read.
"""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from mlacompile.passes.absorb import emit_view
from mlacompile.passes.emit import Emitter
from mlacompile.passes.views import find_view


@st.composite
def viewed(draw: st.DrawFn) -> tuple[tuple[int, ...], torch.Tensor]:
    """The shape of a weight, and a strided view of it: dimensions split in factors, a range of each, in any order."""
    factors = [draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)) for _ in range(draw(st.integers(1, 3)))]
    shape = tuple(int(torch.tensor(f).prod()) for f in factors)
    flat = [n for f in factors for n in f]
    x = torch.arange(int(torch.tensor(shape).prod())).view(shape).view(flat)
    for dim, size in enumerate(flat):
        start = draw(st.integers(0, size - 1))
        x = x.narrow(dim, start, draw(st.integers(1, size - start)))
    order = draw(st.permutations(range(len(flat))))
    x = x.permute(order)
    # at most three axes, as [head, row, rank]; the rest are one element of their range
    while x.dim() > 3:
        x = x.select(-1, draw(st.integers(0, x.shape[-1] - 1)))
    return shape, x


@given(viewed())
@settings(deadline=None)
def test_a_view_is_found_again(case: tuple[tuple[int, ...], torch.Tensor]) -> None:
    shape, want = case
    axes = list(zip(want.shape, want.stride(), strict=True))
    found = find_view(shape, want.storage_offset(), axes)
    assert found is not None
    weight = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    got = found.apply(weight)
    assert torch.equal(got, want)
    assert got.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr(), "a view, never a copy"


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(0, 60),
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_what_is_found_is_exact(shape: list[int], offset: int, axes: list[tuple[int, int]]) -> None:
    """Arbitrary strides need not be a view; when one is found, every element is the one that was asked for."""
    assume(offset < int(torch.tensor(shape).prod()))
    found = find_view(shape, offset, axes)
    if found is None:
        return
    weight = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    want = torch.full([size for size, _ in axes], offset)
    for dim, (size, stride) in enumerate(axes):
        want += (torch.arange(size) * stride).view([-1 if d == dim else 1 for d in range(len(axes))])
    assert torch.equal(found.apply(weight), want)


@given(viewed())
@settings(max_examples=40, deadline=None)
def test_the_view_written_into_a_graph_is_the_same(case: tuple[tuple[int, ...], torch.Tensor]) -> None:
    shape, want = case
    found = find_view(shape, want.storage_offset(), list(zip(want.shape, want.stride(), strict=True)))
    assert found is not None
    graph = Graph()
    weight = graph.placeholder("weight")
    with FakeTensorMode():
        weight.meta["val"] = torch.empty(shape, dtype=torch.int64)
    end = graph.output(weight)
    end.args = (emit_view(Emitter(end), weight, found),)
    numbers = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    assert torch.equal(GraphModule({}, graph)(numbers), want)
