"""Absorbed products beside what is written of a token: which become one launch, if a kernel took them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from mlacompile.lowering import place
from mlacompile.lowering.absorb_and_write import absorb_and_write
from mlacompile.ops import mla_decode, write_latents, write_latents_reference
from mlacompile.ops.absorb_and_write import absorb_and_write_reference
from mlacompile.ops.fp8_linear import fp8_linear, fp8_linear_reference
from mlacompile.testing.absorbed import AbsorbCase, make_absorbed
from tests.lowering.fp8_step import fp8_model, fp8_step
from tests.lowering.rewritten import rewritten, willing

ABSORB_AND_WRITE = torch.ops.mlacompile.absorb_and_write.default
CASE = AbsorbCase(3, 2, 128, 64, 8, kind="static")


@pytest.fixture(autouse=True)
def _willing(monkeypatch: pytest.MonkeyPatch) -> None:
    willing(monkeypatch, {"fp8_linear": fp8_linear_reference, "absorb_and_write": absorb_and_write_reference})


def _step(change: Callable[..., Any] | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """Absorb, write, attend. change: given the product's result, what else there is."""
    settings = make_absorbed(CASE).settings

    def step(x: Tensor, w: Tensor, d: Tensor, *written: Any) -> tuple[Tensor, ...]:
        absorbed = fp8_linear(x, None, w, d, x.dtype)
        q_latent = absorbed.view(2, 3, 1, 128).permute(1, 0, 2, 3)
        more = () if change is None else change(absorbed, written)
        q_pe = write_latents(*(more[0] if more else written), None, **settings)
        caches = [cache[:, 0] for cache in written[6:8]]
        out, _ = mla_decode(q_latent, q_pe, *caches, None, None, None, scale=0.1)
        return out, *more[1:]

    return step


def joined(function: Any, *inputs: Tensor) -> tuple[GraphModule, int]:
    """The graph after the pass, and how many calls there are; results are as they were, and so are the caches."""
    before = [x.clone() for x in inputs]
    gm, count, want, _ = rewritten(function, tuple(inputs), absorb_and_write)
    after = gm(*before)
    for a, b in zip([*want, *inputs], [*after, *before], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert len(gm.graph.find_nodes(op="call_function", target=ABSORB_AND_WRITE)) == count
    return gm, count


def _inputs() -> list[Tensor]:
    return [x for x in make_absorbed(CASE).arguments if x is not None]


def test_both_are_one_launch_before_attention() -> None:
    gm, count = joined(_step(), *_inputs())
    assert count == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=ABSORB_AND_WRITE)
    assert call.kwargs["impl"] == "any"
    left = {node.target for node in gm.graph.nodes}
    assert left.isdisjoint({torch.ops.mlacompile.fp8_linear.default, torch.ops.mlacompile.write_latents.default})


def test_what_is_written_may_not_need_what_is_absorbed() -> None:
    def change(absorbed: Tensor, written: Any) -> Any:
        return ((written[0] + absorbed[0, :, :1].unsqueeze(1), *written[1:]),)

    assert joined(_step(change), *_inputs())[1] == 0


def test_a_product_that_is_read_before_the_token_is_known_keeps_apart() -> None:
    def change(absorbed: Tensor, written: Any) -> Any:
        return ((written[0] * 2, *written[1:]), absorbed.abs())

    assert joined(_step(change), *_inputs())[1] == 0


def test_another_kernel_for_the_product_keeps_it_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    willing(monkeypatch, {"fp8_linear": fp8_linear_reference}, name="rows")
    assert joined(_step(), *_inputs())[1] == 0


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "minicpm3"])
def test_every_layer_of_a_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step with everything in FP8, whatever order a model projects in; logits and caches are as without."""
    willing(monkeypatch, {"write_latents": write_latents_reference})
    model = fp8_model(family)
    got, notes = fp8_step(model, 3)
    monkeypatch.setattr(place, "absorb_and_write", lambda gm: 0)
    want, notes_without = fp8_step(model, 3)
    said = f"{model.config.num_hidden_layers} layers absorb their queries"
    assert any(note.startswith(said) for note in notes)
    assert not any("absorb their queries" in note for note in notes_without)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
