"""Products with one row on a CUDA device: which become one call.

Fake tensors stand in for the device: nothing here runs on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import mlacompile.ops  # noqa: F401  (registers row_product)
from mlacompile.kernels import registry
from mlacompile.kernels.registry import Kernel
from mlacompile.lowering.single_row import place_head_products, place_row_products
from tests.lowering.rewritten import willing

ROW_PRODUCT = torch.ops.mlacompile.row_product.default


@pytest.fixture
def _any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {op: lambda *_, **__: None for op in ("row_product", "head_product")}
    willing(monkeypatch, runs, name="triton")


def _traced(function: object, *shapes: tuple[int, ...]) -> GraphModule:
    with FakeTensorMode():
        inputs = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        return make_fx(function)(*inputs)


def _gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    return hidden


SHAPES = [(1, 1024), (2048, 1024), (2048, 1024), (1024, 2048)]


@pytest.mark.usefixtures("_any_kernel")
def test_a_gate_and_what_it_gates_are_one_call() -> None:
    gm = _traced(_gated, *SHAPES)
    x, gate, up, down = gm.graph.find_nodes(op="placeholder")
    assert place_row_products(gm) == 3
    gm.graph.lint()
    first, second = gm.graph.find_nodes(op="call_function", target=ROW_PRODUCT)
    assert first.args[:2] == (x, [gate, up])
    assert first.kwargs["gate"] == "silu"
    assert second.args[1] == [down]
    assert _left(gm) == {ROW_PRODUCT}


def _left(gm: GraphModule) -> set[object]:
    """What still computes, once dead code is gone."""
    gm.graph.eliminate_dead_code()
    moves = {torch.ops.aten.reshape.default, torch.ops.aten.view.default, operator.getitem}
    return {n.target for n in gm.graph.nodes if n.op == "call_function"} - moves


def _shared(x: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return x @ one.t(), x @ other.t()


@pytest.mark.usefixtures("_any_kernel")
def test_products_of_one_row_are_one_call() -> None:
    gm = _traced(_shared, (1, 1024), (2048, 1024), (512, 1024))
    x, one, other = gm.graph.find_nodes(op="placeholder")
    assert place_row_products(gm) == 2
    (call,) = gm.graph.find_nodes(op="call_function", target=ROW_PRODUCT)
    assert call.args == (x, [one, other], [], None, None)


def _rms_like_llama(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return g * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _rms_like_gemma(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5) * (1 + g.float())).to(x.dtype)


@pytest.mark.usefixtures("_any_kernel")
@pytest.mark.parametrize("norm", [_rms_like_llama, _rms_like_gemma])
def test_a_layer_is_its_products(norm: Callable[[Tensor, Tensor], Tensor]) -> None:
    def layer(x: Tensor, g: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        row = norm(x, g)
        functional = torch.nn.functional
        return x + functional.linear(functional.silu(functional.linear(row, gate)) * functional.linear(row, up), down)

    gm = _traced(layer, (1, 1, 1024), (1024,), (2048, 1024), (2048, 1024), (1024, 2048))
    gm.graph = fx_graph_cse(gm.graph)  # as the pipeline does: both products read one view
    assert place_row_products(gm) == 3
    gm.graph.lint()
    first, second = gm.graph.find_nodes(op="call_function", target=ROW_PRODUCT)
    assert first.kwargs == {"eps": 1e-5, "gate": "silu", "early": False, "impl": "triton"}
    assert first.args[3] is not None
    assert second.args[4] is not None
    small = {torch.ops.aten.add.Tensor, torch.ops.aten._to_copy.default}  # 1 + g
    assert _left(gm) - small == {ROW_PRODUCT}


@pytest.mark.usefixtures("_any_kernel")
@pytest.mark.parametrize(
    "unlike",
    [
        lambda x, g: g * x * torch.rsqrt((x.float() + 1).pow(2).mean(-1, keepdim=True) + 1e-5),  # of something else
        lambda x, g: g * x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + 1e-5),  # a sum
        lambda x, g: g * x.float() * torch.rsqrt(x.float().pow(3).mean(-1, keepdim=True) + 1e-5),
        lambda x, g: x * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + g.narrow(0, 0, 1).float()),
    ],
)
def test_what_only_looks_like_a_norm_stays(unlike: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = _traced(lambda x, g, w: unlike(x, g).to(x.dtype) @ w.t(), (1, 1024), (1024,), (2048, 1024))
    assert place_row_products(gm) == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=ROW_PRODUCT)
    assert call.args[3] is None


@pytest.mark.usefixtures("_any_kernel")
def test_what_is_used_twice_stays() -> None:
    def twice(x: Tensor, residual: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        one, other = x @ gate.t(), x @ up.t()
        return one + residual, torch.nn.functional.silu(one) * other

    gm = _traced(twice, (1, 1024), (1, 2048), (2048, 1024), (2048, 1024))
    assert place_row_products(gm) == 2
    (call,) = gm.graph.find_nodes(op="call_function", target=ROW_PRODUCT)
    assert call.args[4] is None
    assert call.kwargs["gate"] == ""


@pytest.mark.usefixtures("_any_kernel")
def test_a_kernel_that_takes_no_norm_is_asked_without(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Kernel(
        "plain", "any", lambda x, w, s, norm, added, **_: ["no norms"] if norm is not None else [], lambda *_: None
    )
    monkeypatch.setattr(registry, "kernels", lambda _: (plain,))
    gm = _traced(lambda x, g, w: _rms_like_llama(x, g) @ w.t(), (1, 1024), (1024,), (2048, 1024))
    assert place_row_products(gm) == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=ROW_PRODUCT)
    assert call.args[3] is None


@pytest.mark.usefixtures("_any_kernel")
def test_one_row_a_head() -> None:
    gm = _traced(torch.bmm, (16, 1, 128), (16, 128, 512))
    assert place_head_products(gm) == 1
    assert place_head_products(_traced(torch.bmm, (16, 2, 128), (16, 128, 512))) == 0
    assert place_head_products(_traced(torch.bmm, (2, 1, 8), (2, 8, 8))) == 0


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


def _behind(x: Tensor, cache: Tensor, up: Tensor, own: Tensor, scaled: Tensor) -> tuple[Tensor, ...]:
    out = torch.ops.mlacompile.mla_decode(x, None, cache, None, None, None, None, scale=1.0)[0]
    values = torch.bmm(out.view(4, 1, 512), up.reshape(4, 256, 512).narrow(1, 128, 128).transpose(1, 2))
    row = values.reshape(1, 512)
    keys = up.view(4, 256, 512).narrow(1, 0, 128).transpose(1, 2)
    row = row @ own.t()
    return row @ own.t(), row @ (scaled + scaled).t(), torch.bmm(x.view(4, 1, 512), keys)


@pytest.mark.usefixtures("_any_kernel")
def test_weights_behind_attention_are_read_while_it_runs() -> None:
    """If they are inputs that nobody writes: not what the graph makes, and not before the first attention."""
    gm = _traced(_behind, (1, 4, 1, 512), (1, 64, 512), (1024, 512), (512, 512), (2048, 512))
    weights = gm.graph.find_nodes(op="placeholder")[2:]
    assert place_row_products(gm, weights) == 3
    assert place_head_products(gm, weights) == 2
    first, own, scaled = gm.graph.find_nodes(op="call_function", target=ROW_PRODUCT)
    assert own.args[1] == [weights[1]]
    assert own.kwargs["early"]
    assert not first.kwargs["early"]  # right behind one that began early
    assert not scaled.kwargs["early"]
    after, before = gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.head_product.default)
    assert after.kwargs["early"]
    assert not before.kwargs["early"]
    gm = _traced(_behind, (1, 4, 1, 512), (1, 64, 512), (1024, 512), (512, 512), (2048, 512))
    place_row_products(gm)
    place_head_products(gm)
    assert not any(n.kwargs.get("early") for n in gm.graph.nodes)
