"""Products with one row on a CPU: same numbers, in a form that all threads share; everything else stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.lowering.cpu_rows import place_cpu_rows

aten = torch.ops.aten


def _traced(function: Callable[..., Tensor], *inputs: Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def _products(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.target in (aten.mm.default, aten.bmm.default, aten.baddbmm.default)]


@pytest.mark.parametrize(("n", "k"), [(512, 256), (576, 1024), (1030, 64)])
def test_a_row_times_a_weight_is_shared_among_threads(n: int, k: int) -> None:
    x, weight = torch.randn(1, k), torch.randn(n, k)
    gm = _traced(lambda x, w: x @ w.t(), x, weight)
    assert place_cpu_rows(gm) == 1
    assert _products(gm) == [aten.baddbmm.default]
    gm.recompile()
    want = x.double() @ weight.double().t()
    bound = 2 * k * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().t())
    assert ((gm(x, weight).double() - want).abs() <= bound).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_heads(transposed: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 1, 32).to(dtype), torch.randn(4, 32, 48).to(dtype)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    gm = _traced(torch.bmm, x, weight)
    assert place_cpu_rows(gm) == 1
    assert _products(gm) == [aten.baddbmm.default]
    gm.recompile()
    got, want = gm(x, weight), x.double() @ weight.double()
    assert got.shape == want.shape
    bound = 2 * 32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert ((got.double() - want).abs() <= bound * (x.double().abs() @ weight.double().abs())).all()


@pytest.mark.parametrize(
    ("function", "shapes", "dtype"),
    [
        (lambda x, w: x @ w.t(), [(2, 256), (512, 256)], torch.float32),  # two rows
        (lambda x, w: x @ w.t(), [(1, 8), (16, 8)], torch.float32),  # too small to share
        (lambda x, w: x @ w.t(), [(1, 256), (513, 256)], torch.float32),  # cannot be cut evenly
        (lambda x, w: x @ w.t(), [(1, 256), (512, 256)], torch.bfloat16),  # the library shares it already
        (lambda x, w: x @ w, [(1, 256), (256, 512)], torch.float32),  # not stored by rows
    ],
)
def test_what_would_not_gain_stays(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    gm = _traced(function, *(torch.randn(s).to(dtype) for s in shapes))
    before = str(gm.graph)
    assert place_cpu_rows(gm) == 0
    assert str(gm.graph) == before
