"""What tidying takes out of a graph, and that the graph says the same afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.lowering.tidy import tidy
from mlacompile.ops import mla_prefill

CAT, SCATTER = torch.ops.aten.cat.default, torch.ops.aten.as_strided_scatter.default


def _traced(function: object, *shapes: tuple[int, ...]) -> GraphModule:
    with FakeTensorMode():
        return make_fx(function)(*(torch.empty(shape) for shape in shapes))


def _count(gm: GraphModule, target: object) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


def test_a_part_that_lies_otherwise_is_still_viewed() -> None:
    def parts(a: Tensor, b: Tensor) -> Tensor:
        a = (a + 1).transpose(0, 1)
        return torch.cat([a, b], -1).narrow(2, 0, 4).view(6, 4).sin()

    gm = _traced(parts, (3, 2, 4), (2, 3, 4))
    a, b = torch.randn(3, 2, 4), torch.randn(2, 3, 4)
    before = gm(a, b)
    assert tidy(gm) == 1
    gm.recompile()
    assert torch.equal(gm(a, b), before)


def test_an_outer_product_is_no_matrix_product() -> None:
    gm = _traced(torch.bmm, (3, 32, 1), (3, 1, 5))
    assert tidy(gm) == 1
    assert tidy(_traced(torch.bmm, (3, 32, 2), (3, 2, 5))) == 0
    gm.graph.eliminate_dead_code()
    gm.recompile()
    a, b = torch.randn(3, 32, 1), torch.randn(3, 1, 5)
    assert torch.equal(gm(a, b), torch.bmm(a, b))
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)


def test_moves_that_change_nothing_are_taken_out() -> None:
    def moves(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        a, b = a + 1, b + 1
        joined = torch.cat([a, b], -1)
        copied = a.permute(1, 0, 2).clone(memory_format=torch.contiguous_format)  # of one row: contiguous as it is
        return (
            joined.narrow(2, 0, 8).sin(),
            joined.narrow(2, 8, 4).cos(),
            joined.narrow(2, 4, 8).tan(),
            copied.abs(),
            b.clone(),
        )

    gm = _traced(moves, (1, 3, 8), (1, 3, 4))
    before = gm(torch.ones(1, 3, 8), torch.ones(1, 3, 4))
    assert tidy(gm) == 3
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    for got, want in zip(gm(torch.ones(1, 3, 8), torch.ones(1, 3, 4)), before, strict=True):
        assert torch.equal(got, want)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)) == 1


def _rotated(q: Tensor, angle: Tensor) -> Tensor:
    first, second = q.chunk(2, -1)
    return torch.cat([first * angle - second, second * angle + first], -1)


def _last_columns(x: Tensor, angle: Tensor) -> Tensor:
    q = (x + 1).view(2, 5, 3, 12).transpose(1, 2)
    keep, turn = q.split([8, 4], -1)
    return torch.cat([keep, _rotated(turn, angle)], -1)


def _first_columns(x: Tensor, angle: Tensor) -> Tensor:
    q = (x + 1).view(2, 5, 3, 12).transpose(1, 2)
    return torch.cat([_rotated(q[..., :4], angle), q[..., 4:]], dim=-1)


def _by_token(x: Tensor, angle: Tensor) -> Tensor:
    keep, turn = (x + 1).view(2, 5, 3, 12).transpose(1, 2).split([8, 4], -1)
    return torch.cat([keep.permute(0, 2, 1, 3), _rotated(turn, angle).permute(0, 2, 1, 3)], 3).permute(0, 2, 1, 3)


@pytest.mark.parametrize("function", [_last_columns, _first_columns, _by_token])
def test_columns_are_turned_where_they_lie(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    shapes = (10, 36), (5, 2)
    gm = _traced(function, *shapes)
    assert tidy(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    assert (_count(gm, SCATTER), _count(gm, CAT)) == (1, 1)  # the rotation is a concatenation of two new halves
    x, angle = torch.randn(shapes[0]), torch.randn(shapes[1])
    assert torch.equal(gm(x, angle), function(x, angle))
    assert gm(x, angle).stride() == (180, 12, 36, 1)  # by token, as x lies


def test_what_is_read_later_is_not_written() -> None:
    def twice(x: Tensor, w: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ w
        q = product.view(2, 5, 3, 12)
        return torch.cat([q[..., :8], _rotated(q[..., 8:], angle)], -1), product.sin()

    shapes = (10, 16), (16, 36), (2, 5, 3, 2)
    gm, inputs = _traced(twice, *shapes), [torch.randn(shape) for shape in shapes]
    want = gm(*inputs)
    assert tidy(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    for run in (gm, torch.compile(gm)):
        for got, expected in zip(run(*inputs), want, strict=True):
            torch.testing.assert_close(got, expected)


def test_inductor_does_it_in_place() -> None:
    def attention(x: Tensor, w: Tensor, angle: Tensor, c_kv: Tensor, w_uk: Tensor) -> Tensor:
        q = (x @ w).view(2, 5, 3, 12).transpose(1, 2)
        q = torch.cat([q[..., :8], _rotated(q[..., 8:], angle)], -1)
        settings = {"scale": 1.0, "causal": True, "nope_at": 0, "pe_at": 0, "chunk": 8}
        return mla_prefill(q, c_kv, None, w_uk, w_uk, None, None, None, **settings)[0]

    shapes = (10, 16), (16, 36), (5, 2), (2, 5, 8), (3, 12, 8)
    gm, inputs = _traced(attention, *shapes), [torch.randn(shape) for shape in shapes]
    want = gm(*inputs)
    tidy(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    got, (code,) = run_and_get_code(torch.compile(gm), *inputs)
    torch.testing.assert_close(got, want)
    # the memory of the product is that of the queries
    assert "mla_prefill.default(reinterpret_tensor(buf0, (2, 3, 5, 12), (180, 12, 36, 1), 0)" in code


@pytest.mark.parametrize(
    "unlike",
    [
        lambda x, y: torch.cat([(x + 1)[:, :3], y], -1),  # the smaller part
        lambda x, y: torch.cat([x[:, :8], y[:, :4]], -1),  # an input, which cannot be written
        lambda x, y: torch.cat([(x + 1)[:, 2:10], y[:, :4]], -1),  # moved
        lambda x, y: torch.cat([(x + 1)[:, :8], y[:, :3]], -1),  # shorter than it was
        lambda x, y: torch.cat([(x + 1)[:, :8].double(), y[:, :4].double()], -1),
        lambda x, y: torch.cat([(x + 1).split([2, 3])[1][:, :8], y[:3, :4]], -1),  # contiguous, behind something else
        lambda x, y: torch.cat([(x + 1)[2:][:, :8], y[:3, :4]], -1),
        lambda x, y: torch.cat([(x + 1).view(5, 1, 12)[4][:, :8], y[:1, :4]], -1),
    ],
)
def test_other_concatenations_stay(unlike: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = _traced(unlike, (5, 12), (5, 9))
    assert tidy(gm) == 0
    assert _count(gm, CAT) == 1
