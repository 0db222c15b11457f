"""What is dropped when it has been read: only what nobody can read again. Kernels here spoil what they may drop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from mlacompile.lowering import drop_spent as module
from mlacompile.lowering import place
from mlacompile.lowering.drop_spent import drop_spent
from mlacompile.ops.fp8_linear import fp8_linear, fp8_quantize_weight
from mlacompile.ops.fp8_linear_parts import fp8_linear_parts
from mlacompile.ops.quantize_rows import quantize_rows, quantize_rows_reference
from tests.lowering.fp8_step import fp8_model, fp8_step
from tests.lowering.rewritten import rewritten, willing

ROWS = torch.ops.mlacompile.quantize_rows.default
BF16 = torch.bfloat16


def _spoiling(x: Tensor, added: Any, norm: Any, gated: Tensor | None, done: Tensor | None, **settings: Any) -> Any:
    results = quantize_rows_reference(x, added, norm, gated, done, **settings)
    for dropped in (*((x, gated) if settings["spent"] else ()), done):
        if dropped is not None:
            dropped.fill_(torch.nan)
    return results


@pytest.fixture(autouse=True)
def _willing(monkeypatch: pytest.MonkeyPatch) -> None:
    willing(monkeypatch, {"quantize_rows": _spoiling}, name="spoils")
    monkeypatch.setattr(module, "SMALLEST", 1)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows(x: Tensor, *arguments: Any, **settings: Any) -> list[Tensor]:
    return quantize_rows(x, *arguments, **settings, impl="spoils")


def product(rows: list[Tensor], w: Tensor, d: Tensor) -> Tensor:
    return fp8_linear(rows[0], rows[1], w, d, BF16)


def dropped(function: Any, *inputs: Tensor) -> list[tuple[bool, Node | None]]:
    """Of each call whether its rows are spent, and what it drops besides; results are as they were, bit for bit."""
    gm, count, want, got = rewritten(function, inputs, drop_spent)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    calls = gm.graph.find_nodes(op="call_function", target=ROWS)
    found = [(call.kwargs.get("spent", False), call.args[4] if len(call.args) > 4 else None) for call in calls]
    assert count == sum(spent or done is not None for spent, done in found)
    return found


def _inputs() -> tuple[Tensor, ...]:
    return rows_of(3, 256), *fp8_quantize_weight(_random(256, 256)), *fp8_quantize_weight(_random(2, 256, 128))


def rows_of(m: int, k: int) -> Tensor:
    return _random(m, k).to(BF16)


def test_parts_of_a_product_and_what_a_product_gates() -> None:
    def step(x: Tensor, w: Tensor, d: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        first = rows(x)
        second = rows(fp8_linear_parts(first[0], first[1], w, d, 2), x, parts=True)
        both = product(second, w, d)
        gated = rows(both[:, :128], None, None, both[:, 128:], gate="silu")
        return gated[0], gated[1], second[2]

    (first, _), (second, done), (gated, after) = dropped(step, *_inputs())
    assert not first, "an input of the graph"
    assert second
    assert done is not None, "the rows that x was made of"
    assert gated
    assert after is not None, "and those of the product before"
    assert done.args[0].target is after.args[0].target is ROWS  # type: ignore[union-attr]
    assert done is not after


def test_what_attention_makes_and_the_heads_made_of_it() -> None:
    def step(x: Tensor, w: Tensor, d: Tensor, up: Tensor, up_d: Tensor) -> tuple[Tensor, ...]:
        latents = fp8_linear(x.view(3, 2, 128).transpose(0, 1), None, up, up_d, BF16)
        heads = fp8_linear(latents[..., :128], None, up, up_d, BF16)[..., :128]
        return (product(rows(heads.permute(1, 0, 2)), w, d),)

    ((spent, done),) = dropped(step, *_inputs())
    assert spent
    assert done is not None
    assert done.args[0].target is torch.ops.aten.transpose.int, "latents, and not the heads"


@pytest.mark.parametrize("again", ["later", "returned", "by a kernel of Inductor's", "by the other of two equal calls"])
def test_what_is_read_again_is_kept(again: str) -> None:
    def step(x: Tensor, w: Tensor, d: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        first = rows(x)
        made = product(first, w, d)
        if again == "by a kernel of Inductor's":  # which it may fuse with what comes later, and read then
            turned = made.relu()
            quantized = rows(made, turned)
            return product(quantized, w, d), turned.neg()
        quantized = rows(made)
        result = product(quantized, w, d)
        if again == "later":
            return result, rows(made[:, :128])[0]
        if again == "returned":
            return result, made[1:]
        return result, rows(product(first, w, d)[:, :128])[0]

    assert not any(spent for spent, _ in dropped(step, *_inputs())), "either of two calls may come last"


def test_what_is_added_to_itself_is_kept() -> None:
    """Of x and what is added a program may have other rows."""

    def step(x: Tensor, w: Tensor, d: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        made = product(rows(x), w, d)
        return (product(rows(made[:2], made[1:]), w, d),)

    assert not any(spent for spent, _ in dropped(step, *_inputs()))


def test_latents_that_are_read_again_are_kept() -> None:
    def step(x: Tensor, w: Tensor, d: Tensor, up: Tensor, up_d: Tensor) -> tuple[Tensor, ...]:
        latents = fp8_linear(x.view(3, 2, 128).transpose(0, 1), None, up, up_d, BF16)
        first = product(rows(fp8_linear(latents[..., :128], None, up, up_d, BF16)[..., :128].permute(1, 0, 2)), w, d)
        return first, fp8_linear(latents[..., 128:], None, up, up_d, BF16)

    ((spent, done),) = dropped(step, *_inputs())
    assert spent
    assert done is None


def test_what_is_small_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: Tensor, w: Tensor, d: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return (product(rows(product(rows(x), w, d)), w, d),)

    monkeypatch.setattr(module, "SMALLEST", 2 * 3 * 256)
    assert dropped(step, *_inputs())[1] == (True, None)
    monkeypatch.setattr(module, "SMALLEST", 2 * 3 * 256 + 1)
    assert dropped(step, *_inputs())[1] == (False, None)


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
def test_a_step_of_a_model_reads_nothing_that_was_dropped(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fp8_model(family)
    got, notes = fp8_step(model, 20)  # rows that are quantized
    monkeypatch.setattr(place, "drop_spent", lambda gm: 0)
    want, notes_without = fp8_step(model, 20)
    (said,) = (note for note in notes if "drop from L2" in note)
    assert int(said.split()[0]) >= 2 * model.config.num_hidden_layers, "attention's output, and more"
    assert not any("drop from L2" in note for note in notes_without)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
