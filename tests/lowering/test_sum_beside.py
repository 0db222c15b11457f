"""Products in parts of K: whose parts are added up by who quantizes some of their columns, if kernels took both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from mlacompile.lowering.drop_spent import drop_spent
from mlacompile.lowering.sum_beside import sum_beside_rows
from mlacompile.ops.fp8_normed import fp8_normed, fp8_normed_reference
from mlacompile.ops.quantize_rows import quantize_rows, quantize_rows_reference
from mlacompile.testing.normed import make_normed
from tests.lowering.rewritten import rewritten, willing

NORMED, ROWS = torch.ops.mlacompile.fp8_normed.default, torch.ops.mlacompile.quantize_rows.default
SIZES = (5, (256, 72), 7168)  # cut in parts on any device


@pytest.fixture(autouse=True)
def _willing(monkeypatch: pytest.MonkeyPatch) -> None:
    willing(monkeypatch, {"quantize_rows": quantize_rows_reference, "fp8_normed": fp8_normed_reference})


def _inputs() -> list[Tensor]:
    x, descale, squares, weights, descales = make_normed(*SIZES).arguments
    norm = torch.randn(256, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [x, descale, squares, *weights, *descales, norm]


def both(x: Tensor, s: Tensor, squares: Tensor, w: Tensor, w2: Tensor, d: Tensor, d2: Tensor) -> Tensor:
    return fp8_normed(x, s, squares, [w, w2], [d, d2], torch.bfloat16, eps=1e-6)


def rows(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    q, s = quantize_rows(x, None, norm, eps=1e-5)
    return q, s


def sliced(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    latents = made[:, 256:].view(5, 1, 72)
    return *rows(made[:, :256], inputs[7]), latents[..., :64].square(), latents[..., 64:]


def split(*inputs: Tensor) -> tuple[Tensor, ...]:
    queries, latents, k_pe = both(*inputs[:7]).view(5, 1, 328).split([256, 64, 8], -1)
    return *rows(queries.reshape(5, 256), inputs[7].view(1, 256).view(256)), latents + 1, k_pe


def from_the_end(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    return *rows(made[:, :-72], inputs[7]), made[:, -72:-8] + 1, made[:, -8:]


def _summed(function: Any) -> tuple[GraphModule, int, list[Tensor], list[Tensor]]:
    return rewritten(function, tuple(_inputs()), sum_beside_rows)


@pytest.mark.parametrize("layer", [sliced, split, from_the_end])
def test_parts_are_added_up_once(layer: Any) -> None:
    gm, count, want, got = _summed(layer)
    assert count == 1
    (product,) = gm.graph.find_nodes(op="call_function", target=NORMED)
    (call,) = gm.graph.find_nodes(op="call_function", target=ROWS)
    assert product.kwargs["parts"] > 1
    assert product.kwargs["impl"] == call.kwargs["impl"] == "any"
    assert (call.kwargs["beside"], call.kwargs["dtype"], call.args[0]) == (72, torch.bfloat16, product)
    assert list(product.users) == [call]
    # In another order of sums, and a value near the middle between two may go to the other one.
    for one, other in zip(want, got, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= 0.01 * one.float().norm()


def test_parts_are_dropped_when_they_have_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlacompile.lowering import drop_spent as module

    monkeypatch.setattr(module, "SMALLEST", 1)
    gm, _, _, _ = _summed(sliced)
    assert drop_spent(gm) == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=ROWS)
    assert call.kwargs["spent"]


def _whole(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    return *rows(made[:, :256], inputs[7]), made


def _twice(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    return *rows(made[:, :256], inputs[7]), made[:, :256] + 1, made[:, 256:]


def _across(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    return *rows(made[:, :256], inputs[7]), made[:, 128:]


def _from_the_middle(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    return *rows(made[:, 72:], inputs[7]), made[:, :72]


def _every_other(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    return *rows(made[:, :256], inputs[7]), made[:, 256::2]


def _added(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    q, s, total = quantize_rows(made[:, :256], made[:, 72:], inputs[7], eps=1e-5)
    return q, s, total


def _late_norm(*inputs: Tensor) -> tuple[Tensor, ...]:
    made = both(*inputs[:7])
    return *rows(made[:, :256], inputs[7] * made[0, 256]), made[:, 256:]


@pytest.mark.parametrize("layer", [_whole, _twice, _across, _from_the_middle, _every_other, _added, _late_norm])
def test_what_others_read_is_left_alone(layer: Any) -> None:
    gm, count, want, got = _summed(layer)
    assert count == 0
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(want, got, strict=True))
    (product,) = gm.graph.find_nodes(op="call_function", target=NORMED)
    assert product.kwargs.get("parts", 1) == 1


def test_a_product_that_is_not_cut_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlacompile.lowering import sum_beside

    monkeypatch.setattr(sum_beside, "stream_parts", lambda *_: 1)
    assert _summed(sliced)[1] == 0
