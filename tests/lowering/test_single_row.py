"""Products with one row on a CUDA device: which become one call.

Fake tensors stand in for the device: nothing here runs on it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import mlacompile.ops  # noqa: F401  (registers row_product)
from mlacompile.kernels import registry
from mlacompile.kernels.registry import Kernel
from mlacompile.lowering.single_row import place_row_products

ROW_PRODUCT = torch.ops.mlacompile.row_product.default


@pytest.fixture
def _any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    willing = Kernel("triton", "row_product", lambda *_: [], lambda *_: None)
    monkeypatch.setattr(registry, "kernels", lambda _: (willing,))


def _traced(function: object, *shapes: tuple[int, ...]) -> GraphModule:
    with FakeTensorMode():
        inputs = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        return make_fx(function)(*inputs)


def _gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    return hidden


SHAPES = [(1, 1024), (2048, 1024), (2048, 1024), (1024, 2048)]


@pytest.mark.usefixtures("_any_kernel")
def test_products_of_one_row_are_one_call() -> None:
    gm = _traced(_gated, *SHAPES)
    x, gate, up, down = gm.graph.find_nodes(op="placeholder")
    assert place_row_products(gm) == 3
    gm.graph.lint()
    first, second = gm.graph.find_nodes(op="call_function", target=ROW_PRODUCT)
    assert first.args == (x, [gate, up])
    assert second.args[1] == [down]
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)


@pytest.mark.usefixtures("_any_kernel")
def test_small_products_and_several_rows_stay() -> None:
    assert place_row_products(_traced(lambda x, w: x @ w.t(), (1, 64), (64, 64))) == 0
    assert place_row_products(_traced(lambda x, w: x @ w.t(), (2, 1024), (2048, 1024))) == 0


def test_without_a_kernel_the_graph_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "kernels", lambda _: ())
    gm = _traced(_gated, *SHAPES)
    before = str(gm.graph)
    assert place_row_products(gm) == 0
    assert str(gm.graph) == before
