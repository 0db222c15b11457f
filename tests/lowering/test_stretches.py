"""Which stretch of another value a node is, against what it holds of one that counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.lowering.stretches import stretch_of

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("parts", "dim"),
    [
        (lambda x: [x[1:3], x[:2], x[-3:-1], x[-9:2]], 0),
        (lambda x: [x[:, 3:], x[:, -2:], x[:, 2:99]], 1),
        (lambda x: x.split([2, 1, 5], -1), 1),
        (lambda x: [aten.slice.Tensor(x), aten.slice.Tensor(x, -2, 1), *x.split([3, 1])], 0),
    ],
)
def test_where_it_begins(parts: Callable[[Tensor], Sequence[Tensor]], dim: int) -> None:
    counts = torch.arange(32).view(4, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        gm = make_fx(lambda x: list(parts(x)))(mode.from_tensor(counts))
    (whole,) = gm.graph.find_nodes(op="placeholder")
    (output,) = gm.graph.find_nodes(op="output")
    found = [stretch_of(node) for node in output.args[0] if node is not whole]
    assert found
    for stretch, part in zip(found, (p for p in gm(counts) if p is not counts), strict=True):
        assert stretch is not None
        assert stretch[:2] == (whole, dim)
        assert torch.equal(counts.narrow(dim, stretch[2], part.shape[dim]), part)


def test_what_is_none() -> None:
    def others(x: Tensor) -> list[Tensor]:
        return [x[::2], x + 1, x[0], x.t(), *x.unbind(0)]

    gm = make_fx(others)(torch.arange(32).view(4, 8))
    (output,) = gm.graph.find_nodes(op="output")
    assert all(stretch_of(node) is None for node in output.args[0])
