"""FP8 products of the same rows: which become one launch, if a kernel took them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.lowering.stack_products import stack_products
from mlacompile.ops.fp8_linear import E4M3, fp8_linear
from mlacompile.ops.fp8_quantize import fp8_quantize
from tests.lowering.rewritten import willing

STACKED = torch.ops.mlacompile.fp8_stacked.default
LINEAR = torch.ops.mlacompile.fp8_linear.default


@pytest.fixture
def _any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    willing(monkeypatch, {"fp8_stacked": lambda *_: None}, name="triton")


def _traced(function: object, x: tuple[int, ...], *weights: tuple[int, int]) -> GraphModule:
    with FakeTensorMode():
        inputs = [torch.empty(x, device="cpu", dtype=torch.bfloat16)]
        for n, k in weights:
            inputs.append(torch.empty((n, k), device="cpu", dtype=E4M3))
            inputs.append(torch.empty((-(-n // 128), -(-k // 128)), device="cpu"))
        return make_fx(function)(*inputs)


def _quantized(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return fp8_linear(*fp8_quantize(x, 128, E4M3), w, s, torch.bfloat16)


def _gated(x: Tensor, *weights: Tensor) -> Tensor:
    """As modules do that know nothing of each other: x is quantized for each."""
    return torch.nn.functional.silu(_quantized(x, *weights[:2])).view(-1) * _quantized(x, *weights[2:]).view(-1)


@pytest.mark.usefixtures("_any_kernel")
def test_a_gate_and_what_it_gates_are_one_launch() -> None:
    gm = _traced(_gated, (64, 512), (1024, 512), (1024, 512))
    assert stack_products(gm) == 1
    gm.graph.lint()
    stable_topological_sort(gm.graph)  # which counts nodes, too
    (made,) = gm.graph.find_nodes(op="call_function", target=STACKED)
    assert made.meta["val"].shape == (64, 2048)
    assert made.kwargs == {"impl": "triton"}
    names = [w.name for w in made.args[2]]
    assert names == [p.name for p in gm.graph.find_nodes(op="placeholder")][1::2]
    assert not gm.graph.find_nodes(op="call_function", target=LINEAR)


@pytest.mark.usefixtures("_any_kernel")
def test_the_one_that_ends_within_a_block_comes_last() -> None:
    def both(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return fp8_linear(x, None, *weights[:2], torch.bfloat16), fp8_linear(x, None, *weights[2:], torch.bfloat16)

    gm = _traced(both, (16, 512), (576, 512), (1536, 512))
    assert stack_products(gm) == 1
    (made,) = gm.graph.find_nodes(op="call_function", target=STACKED)
    assert [w.meta["val"].shape[0] for w in made.args[2]] == [1536, 576]
    outs = [n.args[1:] for n in gm.graph.output_node().all_input_nodes]
    assert outs == [(1, 1536, 2112), (1, 0, 1536)]
    gm = _traced(both, (16, 512), (576, 512), (200, 512))
    assert stack_products(gm) == 0, "neither ends with a block"


@pytest.mark.usefixtures("_any_kernel")
def test_views_of_a_part_are_traced_again() -> None:
    def halves(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (_quantized(x, *weights[i : i + 2]) for i in (0, 2))
        left, right = first.view(8, 1, 4, 64).transpose(1, 2).split([16, 48], -1)
        return left.squeeze(2) + 1, right * second.view(8, 256)[:, None, None, :48]

    gm = _traced(halves, (8, 256), (256, 256), (256, 256))
    assert stack_products(gm) == 1
    for node in gm.graph.nodes:  # a value is what the node makes of the values before it
        if isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
            args = torch.fx.map_arg(node.args, lambda n: n.meta["val"])
            with node.meta["val"][0].fake_mode if isinstance(node.meta["val"], list) else node.meta["val"].fake_mode:
                again = node.target(*args)
            pairs = (
                zip(again, node.meta["val"], strict=True)
                if isinstance(again, (list, tuple))
                else [(again, node.meta["val"])]
            )
            assert all(a.stride() == b.stride() and a.shape == b.shape for a, b in pairs), node


@pytest.mark.usefixtures("_any_kernel")
def test_of_three_two_are_one() -> None:
    def three(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [_quantized(x, *weights[i : i + 2]) for i in (0, 2, 4)]

    gm = _traced(three, (8, 256), (512, 256), (256, 256), (256, 256))
    gm.graph = fx_graph_cse(gm.graph)
    assert stack_products(gm) == 1
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=LINEAR)) == 1


@pytest.mark.usefixtures("_any_kernel")
def test_products_of_other_rows_stay_apart() -> None:
    def two(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return _quantized(x, *weights[:2]), _quantized(x + 1, *weights[2:])

    assert stack_products(_traced(two, (8, 256), (512, 256), (256, 256))) == 0


@pytest.mark.usefixtures("_any_kernel")
def test_a_weight_that_is_made_in_between_is_not_waited_for() -> None:
    def two(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        first = _quantized(x, w, s)
        return first, _quantized(x, w, s + first[0, 0])

    assert stack_products(_traced(two, (8, 256), (512, 256))) == 0


def test_nothing_without_a_kernel() -> None:
    assert stack_products(_traced(_gated, (64, 512), (1024, 512), (1024, 512))) == 0, "none runs on a CPU"
