"""Products of heads whose rows are quantized: which leave in FP8, if a kernel made them so, and what they drop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from mlacompile.kernels import registry
from mlacompile.lowering import drop_spent as module
from mlacompile.lowering import place
from mlacompile.lowering.drop_spent import drop_spent
from mlacompile.lowering.heads_quantized import quantize_heads
from mlacompile.ops.fp8_linear import fp8_linear, fp8_quantize_weight
from mlacompile.ops.heads_quantized import heads_quantized, heads_quantized_reference
from mlacompile.ops.quantize_rows import quantize_rows, quantize_rows_reference
from tests.lowering.fp8_step import fp8_model, fp8_step
from tests.lowering.rewritten import rewritten, willing

HEADS_QUANTIZED = torch.ops.mlacompile.heads_quantized.default
ROWS = torch.ops.mlacompile.quantize_rows.default
BF16 = torch.bfloat16


def _spoiling(x: Tensor, weight: Tensor, descale: Tensor, *, spent: bool = False) -> tuple[Tensor, Tensor]:
    results = heads_quantized_reference(x, weight, descale)
    if spent:
        x.fill_(torch.nan)
    return results


@pytest.fixture
def slower() -> list[str]:
    """Why the kernel in this test would be."""
    return []


@pytest.fixture(autouse=True)
def _willing(monkeypatch: pytest.MonkeyPatch, slower: list[str]) -> None:
    willing(monkeypatch, {"quantize_rows": quantize_rows_reference})
    willing(monkeypatch, {"heads_quantized": _spoiling}, name="spoils", slower=slower)
    monkeypatch.setattr(module, "SMALLEST", 1)


def joined(function: Any, *inputs: Tensor) -> tuple[GraphModule, int]:
    """The graph after the pass, and how many calls there are; results are as they were, bit for bit."""
    gm, count, want, got = rewritten(function, inputs, quantize_heads)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert len(gm.graph.find_nodes(op="call_function", target=HEADS_QUANTIZED)) == count
    return gm, count


def _inputs(width: int = 128) -> tuple[Tensor, ...]:
    """Latents of two heads and three tokens, what makes heads of that width of them, and a projection."""
    generator = torch.Generator().manual_seed(width)
    x, up = (torch.randn(shape, generator=generator) for shape in ((2, 3, 256), (2, width, 256)))
    down = torch.randn(256, 2 * width, generator=generator)
    return x.to(BF16), *fp8_quantize_weight(up), *fp8_quantize_weight(down)


def heads_of(x: Tensor, up: Tensor, up_d: Tensor) -> Tensor:
    return fp8_linear(x, None, up, up_d, x.dtype)  # type: ignore[no-any-return]


def rows_of(heads: Tensor, *arguments: Any, **settings: Any) -> list[Tensor]:
    return quantize_rows(heads.permute(1, 0, 2), *arguments, **settings, impl="any")  # type: ignore[no-any-return]


def project(rows: list[Tensor], w: Tensor, d: Tensor) -> Tensor:
    return fp8_linear(rows[0], rows[1], w, d, BF16)  # type: ignore[no-any-return]


def step(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return (project(rows_of(heads_of(x, up, up_d)), w, d),)


def test_both_are_one_launch() -> None:
    gm, count = joined(step, *_inputs())
    assert count == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=HEADS_QUANTIZED)
    assert [node.op for node in call.args] == ["placeholder"] * 3
    assert call.kwargs == {"impl": "spoils"}
    assert not gm.graph.find_nodes(op="call_function", target=ROWS)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.fp8_linear.default)) == 1
    assert [value.shape for value in call.meta["val"]] == [(3, 256), (3, 2)]


def test_every_one_of_several() -> None:
    def several(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        again = project(rows_of(heads_of(x, up, up_d)), w, d).view(3, 2, 128).transpose(0, 1)
        return (project(rows_of(heads_of(torch.cat([again, again], 2), up, up_d)), w, d),)

    assert joined(several, *_inputs())[1] == 2


@pytest.mark.parametrize("slower", [["tiles and a pass over them are faster"]])
def test_a_kernel_that_would_be_slower_is_not_chosen(slower: list[str]) -> None:
    assert joined(step, *_inputs())[1] == 0


def test_without_a_kernel_they_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    willing = registry.kernels
    monkeypatch.setattr(registry, "kernels", lambda op: () if op == "heads_quantized" else willing(op))
    assert joined(step, *_inputs())[1] == 0


@pytest.mark.parametrize("what", ["heads", "heads as they lie"])
def test_heads_that_something_else_reads_stay(what: str) -> None:
    def both(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        heads = heads_of(x, up, up_d)
        moved = heads.permute(1, 0, 2)
        made = project(quantize_rows(moved, impl="any"), w, d)
        return made, (heads if what == "heads" else moved).abs()

    assert joined(both, *_inputs())[1] == 0


def test_heads_of_another_width_stay() -> None:
    def wide(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        moved = heads_of(x, up, up_d).permute(1, 0, 2).reshape(3, -1)
        return (project(quantize_rows(moved, impl="any"), w, d),)

    assert joined(wide, *_inputs(256))[1] == 0


def test_rows_that_something_is_done_to_stay() -> None:
    def normed(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        norm = torch.ones(256, dtype=BF16)
        return (project(rows_of(heads_of(x, up, up_d), None, norm, eps=1e-6), w, d),)

    def added(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return (project(rows_of(heads_of(x, up, up_d), x[0]), w, d),)

    def gated(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return (project(rows_of(heads_of(x, up, up_d), None, None, x[0], gate="silu"), w, d),)

    def turned(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        heads = heads_of(x[:, :2], up, up_d)
        return (project(quantize_rows(heads.permute(0, 1, 2), impl="any"), w, d),)

    def as_they_are(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return (project(quantize_rows(heads_of(x[:, :2], up, up_d), impl="any"), w, d),)

    for function in (normed, added, gated, turned, as_they_are):
        assert joined(function, *_inputs())[1] == 0, function.__name__


def test_a_product_in_another_dtype_or_of_rows_in_fp8_stays() -> None:
    def other(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return (project(rows_of(fp8_linear(x, None, up, up_d, torch.float32)), w, d),)

    def quantized(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        q, descale = torch.ops.mlacompile.fp8_quantize(x, 128, torch.float8_e4m3fn)
        return (project(rows_of(fp8_linear(q, descale, up, up_d, BF16)), w, d),)

    for function in (other, quantized):
        assert joined(function, *_inputs())[1] == 0, function.__name__


def spent(function: Any, *inputs: Tensor) -> list[bool]:
    """Of each call whether it drops what it reads; results are as they were, bit for bit."""
    gm, count, want, got = rewritten(function, inputs, drop_spent)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    calls = gm.graph.find_nodes(op="call_function", target=HEADS_QUANTIZED)
    found = [call.kwargs.get("spent", False) for call in calls]
    assert count == sum(found)
    return found


def quantized_heads(x: Tensor, up: Tensor, up_d: Tensor) -> tuple[Tensor, Tensor]:
    return heads_quantized(x, up, up_d, impl="spoils")  # type: ignore[no-any-return]


def latents_of(x: Tensor, up: Tensor, up_d: Tensor) -> Tensor:
    """``[2, 3, 256]`` that an op of ours has made."""
    return fp8_linear(x, None, torch.cat([up, up], 1), torch.cat([up_d, up_d], 1), x.dtype)  # type: ignore[no-any-return]


def test_latents_that_nobody_reads_again_are_dropped() -> None:
    def ours(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return (project(list(quantized_heads(latents_of(x, up, up_d), up, up_d)), w, d),)

    assert spent(ours, *_inputs()) == [True]


@pytest.mark.parametrize("again", ["an input", "later", "returned", "by a kernel of Inductor's", "by another of these"])
def test_latents_that_may_be_read_again_are_kept(again: str) -> None:
    def ours(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        latents = latents_of(x, up, up_d)
        if again == "an input":
            latents = x
        if again == "by a kernel of Inductor's":  # which it may fuse with what comes later, and read then
            turned = latents.relu()
        first = quantized_heads(latents, up, up_d)
        made = project(list(first), w, d)
        if again == "later":
            return made, fp8_linear(latents[..., :128], None, up[..., :128], up_d[..., :1], BF16)
        if again == "returned":
            return made, latents[1:]
        if again == "by a kernel of Inductor's":
            return made, turned.neg()
        if again == "by another of these":
            return made, quantized_heads(latents, up.flip(0), up_d.flip(0))[0]
        return (made,)

    assert not any(spent(ours, *_inputs())), "either may come last"


def test_small_latents_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(x: Tensor, up: Tensor, up_d: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return (project(list(quantized_heads(latents_of(x, up, up_d), up, up_d)), w, d),)

    monkeypatch.setattr(module, "SMALLEST", 2 * 2 * 3 * 256)
    assert spent(ours, *_inputs()) == [True]
    monkeypatch.setattr(module, "SMALLEST", 2 * 2 * 3 * 256 + 1)
    assert spent(ours, *_inputs()) == [False]


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
def test_every_layer_of_a_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step with everything in FP8; nothing that was dropped is read, and logits and caches are as without."""
    model = fp8_model(family)
    got, notes = fp8_step(model, 20)  # rows that are quantized
    monkeypatch.setattr(place, "quantize_heads", lambda gm: 0)
    monkeypatch.setattr(place, "drop_spent", lambda gm: 0)
    want, notes_without = fp8_step(model, 20)
    layers = model.config.num_hidden_layers
    assert any(note.startswith(f"{layers} absorbed products leave what they make") for note in notes)
    (said,) = (note for note in notes if "drop from L2" in note)
    assert int(said.split()[0]) >= layers, "what attention makes, and more"
    assert not any("absorbed products" in note or "drop from L2" in note for note in notes_without)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
