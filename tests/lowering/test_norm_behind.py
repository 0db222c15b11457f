"""Norms before FP8 products: where their root becomes a factor behind the product, if kernels took both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from mlacompile.lowering.norm_behind import norms_behind_products
from mlacompile.ops.fp8_linear import fp8_linear, fp8_quantize_weight
from mlacompile.ops.fp8_normed import fp8_normed_reference
from mlacompile.ops.fp8_stacked import fp8_stacked
from mlacompile.ops.quantize_rows import quantize_rows, quantize_rows_reference
from tests.lowering.rewritten import rewritten, willing

NORMED, ROWS = torch.ops.mlacompile.fp8_normed.default, torch.ops.mlacompile.quantize_rows.default
K = 2304  # two stretches


def _kernels(monkeypatch: pytest.MonkeyPatch, slower: list[str]) -> None:
    willing(monkeypatch, {"quantize_rows": quantize_rows_reference})
    willing(monkeypatch, {"fp8_normed": fp8_normed_reference}, slower=slower)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def _inputs(k: int = K) -> list[Tensor]:
    return [_random(5, k), _random(5, k), _random(k), *fp8_quantize_weight(_random(256, k).float())]


def _behind(function: Any, *inputs: Tensor) -> tuple[GraphModule, int, list[Tensor], list[Tensor]]:
    """The graph after the pass, how many norms moved, and results before and after."""
    gm, moved, want, got = rewritten(function, inputs, norms_behind_products)
    assert len(gm.graph.find_nodes(op="call_function", target=NORMED)) == moved
    return gm, moved, want, got


def one(x: Tensor, added: Tensor, norm: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    q, s, total = quantize_rows(x, added, norm, eps=1e-6)
    return fp8_linear(q, s, w, d, x.dtype), total


def two(x: Tensor, added: Tensor, norm: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    q, s = quantize_rows(x + added, None, norm, eps=1e-6)
    return (fp8_stacked(q, s, [w, w], [d, d], x.dtype),)


def parts(x: Tensor, added: Tensor, norm: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    q, s, total = quantize_rows(torch.stack([x.float(), x.float()]), added, norm, eps=1e-6, parts=True)
    return fp8_linear(q, s, w, d, x.dtype), total


def plain(x: Tensor, added: Tensor, norm: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    q, s, total = quantize_rows(x, added)
    return fp8_linear(q, s, w, d, x.dtype), total


def shared(x: Tensor, added: Tensor, norm: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    q, s, _ = quantize_rows(x, added, norm, eps=1e-6)
    return fp8_linear(q, s, w, d, x.dtype), s


def apart(x: Tensor, added: Tensor, norm: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    q, s, _ = quantize_rows(x, added, norm, eps=1e-6)
    return fp8_linear(q, s, w, d, x.dtype), fp8_linear(q, s, w, d, torch.float32)


@pytest.mark.parametrize("layer", [one, two, parts])
def test_a_root_moves_behind_the_product(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels(monkeypatch, [])
    gm, moved, want, got = _behind(layer, *_inputs())
    assert moved == 1
    (rows,) = gm.graph.find_nodes(op="call_function", target=ROWS)
    (product,) = gm.graph.find_nodes(op="call_function", target=NORMED)
    assert rows.kwargs["squares"] is True
    assert product.kwargs == {"eps": 1e-6, "impl": "any"}
    assert [a.args for a in product.args[:3]] == [(rows, i) for i in (0, 1, 2 if layer is two else 3)]
    # Values near the middle between two of FP8 may go to the other one.
    assert (want[0] - got[0]).norm() <= 0.01 * want[0].norm()
    assert len(want) == 1 or torch.equal(want[1], got[1]), "the sum is the same"


@pytest.mark.parametrize("layer", [plain, shared, apart])
def test_what_others_want_is_left_alone(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels(monkeypatch, [])
    gm, moved, want, got = _behind(layer, *_inputs())
    assert moved == 0
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    (rows,) = gm.graph.find_nodes(op="call_function", target=ROWS)
    assert not rows.kwargs.get("squares")


def test_a_row_of_one_stretch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels(monkeypatch, [])
    assert _behind(one, *_inputs(2048))[1] == 0


def test_where_another_kernel_is_faster_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels(monkeypatch, ["others are faster"])
    gm, moved, *_ = _behind(one, *_inputs())
    assert moved == 0
    assert len(gm.graph.find_nodes(op="call_function", target=ROWS)) == 1, "what was tried is gone"
