"""Quantizations and what stands before them: which become one pass, if a kernel took them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mlacompile.kernels import registry
from mlacompile.kernels.registry import Kernel
from mlacompile.lowering import quantized_rows
from mlacompile.lowering.quantized_rows import place_quantized_rows
from mlacompile.ops.fp8_linear import fp8_quantize_weight
from mlacompile.ops.fp8_linear_parts import fp8_linear_parts_reference
from mlacompile.ops.fp8_quantize import fp8_quantize
from mlacompile.ops.quantize_rows import quantize_rows_reference
from tests.lowering.rewritten import rewritten, willing

ROWS = torch.ops.mlacompile.quantize_rows.default
QUANTIZE = torch.ops.mlacompile.fp8_quantize.default


@pytest.fixture(autouse=True)
def _any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    willing(monkeypatch, {"quantize_rows": quantize_rows_reference})


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    return fp8_quantize(x.reshape(-1, x.shape[-1]), 128, torch.float8_e4m3fn)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def placed(function: Any, *inputs: Tensor) -> tuple[GraphModule, list[Node], list[Tensor]]:
    """The graph after the pass, its calls, and the largest difference of its results from those before."""
    gm, count, want, got = rewritten(function, inputs, place_quantized_rows)
    calls = list(gm.graph.find_nodes(op="call_function", target=ROWS))
    assert count == len(calls)
    off = [(g.double() - w.double()).abs().max() / w.double().abs().max() for g, w in zip(got, want)]
    return gm, calls, off


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_sum_a_norm_and_the_quantization_are_one() -> None:
    def layer(x: Tensor, made: Tensor, weight: Tensor, more: Tensor) -> tuple[Tensor, ...]:
        total = x + made
        q, descale = quantized(normed(total, weight))
        return q, descale, total + more

    gm, (call,), off = placed(layer, random(5, 1, 256), random(5, 1, 256), random(256), random(5, 1, 256))
    assert [n.op for n in call.args[:3]] == ["call_function", "call_function", "placeholder"]
    assert call.kwargs == {"eps": 1e-6, "gate": "", "parts": False, "impl": "any"}
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)) == 1, "what uses the sum"
    assert max(off) < 0.07, "half a step of e4m3, where a value lies between two"
    assert off[2] == 0


def in_parts(x: Tensor, q: Tensor, s: Tensor, w: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = x + torch.ops.mlacompile.fp8_linear(q, s, w, d, x.dtype).reshape(5, 1, 256)
    return (*quantized(normed(total, weight)), total)


def in_parts_turned(x: Tensor, q: Tensor, s: Tensor, w: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = torch.ops.mlacompile.fp8_linear(q, s, w, d, x.dtype).reshape(5, 1, 256) + x
    return (*quantized(normed(total, weight)), total)


def wanted_twice(x: Tensor, q: Tensor, s: Tensor, w: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    made = torch.ops.mlacompile.fp8_linear(q, s, w, d, x.dtype).reshape(5, 1, 256)
    return (*quantized(normed(x + made, weight)), made * 2)


@pytest.mark.parametrize(
    ("layer", "dtype", "slower", "added_up"),
    [
        (in_parts, torch.bfloat16, [], True),
        (in_parts_turned, torch.float16, [], True),
        (in_parts, torch.float32, [], False),  # which wants all bits of a sum
        (in_parts, torch.bfloat16, ["whole it is faster"], False),
        (wanted_twice, torch.bfloat16, [], False),
    ],
)
def test_a_sum_with_a_product_in_parts_adds_those_up(
    layer: Any, dtype: torch.dtype, slower: list[str], added_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    willing = Kernel(
        "any", "fp8_linear_parts", lambda *_, **__: [], fp8_linear_parts_reference, lambda *_, **__: slower
    )
    ours = registry.kernels
    monkeypatch.setattr(registry, "kernels", lambda op: (willing,) if op == "fp8_linear_parts" else ours(op))
    monkeypatch.setattr(quantized_rows, "stream_parts", lambda m, n, k, device: 2)
    q, s = fp8_quantize(random(5, 384), 128, torch.float8_e4m3fn)
    w, d = fp8_quantize_weight(random(256, 384))
    gm, (call,), off = placed(layer, random(5, 1, 256).to(dtype), q, s, w, d, random(256).to(dtype))
    assert call.kwargs == {"eps": 1e-6, "gate": "", "parts": added_up, "impl": "any"}
    assert off[0] <= 32 / 448, "one step of e4m3, where a value rounded to 16 bits in between lies between two"
    assert max(off[1:]) <= 2 * torch.finfo(dtype).eps
    whole = gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.fp8_linear.default)
    assert len(whole) == (not added_up)
    if added_up:
        parts, added = call.args[:2]
        assert parts.target is torch.ops.mlacompile.fp8_linear_parts.default
        assert (parts.args[4], parts.kwargs) == (2, {"impl": "any"})
        assert parts.meta["val"].shape == (2, 5, 256)
        assert added.args[0].name == "x_1"


def test_a_norm_of_what_is_there() -> None:
    _, (call,), off = placed(lambda x, w: quantized(normed(x, w)), random(4, 384), random(384))
    assert call.args[1] is None
    assert max(off) < 0.07


def test_a_gate() -> None:
    def gate(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return quantized(torch.nn.functional.silu(g).reshape(3, 256) * u.reshape(3, 256))

    _, (call,), off = placed(gate, random(3, 1, 256), random(3, 1, 256))
    assert call.kwargs["gate"] == "silu"
    assert [n.args[0].name for n in (call.args[0], call.args[3])] == ["g_1", "u_1"]
    assert max(off) < 0.07


def test_heads_side_by_side() -> None:
    def heads(x: Tensor) -> tuple[Tensor, Tensor]:
        moved = (x * 1).reshape(4, 6, 1, 128).permute(1, 0, 2, 3).contiguous()
        return quantized(moved.reshape(6, 4, 1, 128).transpose(1, 2).reshape(6, 1, 512))

    _, (call,), off = placed(heads, random(4, 6, 128))
    assert call.args[0].meta["val"].stride() == (128, 6 * 128, 1)
    assert max(off) == 0


def test_heads_in_another_order_are_left_alone() -> None:
    def heads(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantized((x * 1).flip(0).reshape(4, 6, 128).permute(1, 2, 0).reshape(6, 512))

    gm, calls, _ = placed(heads, random(4, 6, 128))
    assert not calls
    assert gm.graph.find_nodes(op="call_function", target=QUANTIZE)


def test_what_another_node_wants_is_left_alone() -> None:
    def routed(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = normed(x, w)
        return (*quantized(y), y.sum(-1))

    assert not placed(routed, random(4, 256), random(256))[1]


def test_other_groups_and_types_are_left_alone() -> None:
    def other(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = normed(x, w)
        return fp8_quantize(y, 256, torch.float8_e4m3fn)

    assert not placed(other, random(4, 256), random(256))[1]
    assert not placed(lambda x: fp8_quantize(x * 2, 128, torch.float8_e5m2), random(4, 256))[1]
