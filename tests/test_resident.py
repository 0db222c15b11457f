"""Models in memory whose linear layers have their weights in FP8 alone."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

import mlacompile
import mlacompile.compiler as compiler
from mlacompile import backend, last_report, quantize
from mlacompile.errors import UnsupportedInputError
from mlacompile.ops.fp8_linear import fp8_linear, fp8_quantize_weight
from mlacompile.ops.fp8_quantize import fp8_quantize
from mlacompile.resident import QuantizedLinear
from mlacompile.testing.models import random_tokens, tiny_model

#: Heads whose parts of the up-projection begin and end between blocks, as in DeepSeek-V3.
ALIGNED = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "q_lora_rank": 128,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
}


def decode(model: Any, run: Any) -> torch.Tensor:
    tokens = random_tokens(model.config, 2, 10)
    past = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=tokens[:, :8], past_key_values=past)
        return torch.cat([run(input_ids=tokens[:, i : i + 1], past_key_values=past).logits for i in (8, 9)], 1)


def with_weights_of(model: Any) -> Any:
    """The same model with linear layers as they were, of the weights that ``model``, now quantized, has. With few rows
    both compute the same."""
    exact = copy.deepcopy(model)
    quantize(model)
    exact.load_state_dict(model.state_dict())
    return exact


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("rows", [3, 20])
def test_a_layer_computes_the_product_of_the_op_and_its_original_is_gone(rows: int) -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).requires_grad_(False)
    original, first = weakref.ref(model[0].weight), fp8_quantize_weight(model[0].weight)
    x = torch.randn(rows, 256)
    left = (x, None) if rows == 3 else fp8_quantize(x, 128, torch.float8_e4m3fn)
    want = model[2](torch.relu(fp8_linear(*left, *first, x.dtype) + model[0].bias))
    done = quantize(model)
    gc.collect()
    assert original() is None, "the original weight should be released"
    assert done.quantized == ("0",)
    assert done.kept == {"2": "its weight [64, 128] is smaller than a block of 128 × 128"}
    assert done.bytes_after == done.bytes_before - 3 * 256 * 128 + 4 * 2
    assert torch.equal(model(x), want)
    assert "1 linear layers in FP8" in str(done)


def test_state_dicts_are_those_of_the_original_and_settle() -> None:
    model = nn.Sequential(nn.Linear(200, 300)).bfloat16().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantize(model)
    after = model.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}
    assert float((after["0.weight"] - before["0.weight"]).abs().max()) <= 2.0**-4 * float(
        before["0.weight"].abs().max()
    )
    nn.Sequential(nn.Linear(200, 300)).load_state_dict(after)
    model.load_state_dict(after)
    again = model.state_dict()
    model.load_state_dict(again)
    assert all(torch.equal(model.state_dict()[k], again[k]) for k in again)
    q, descale = fp8_quantize_weight(before["0.weight"] * 2)
    model.load_state_dict({"0.weight": q, "0.weight_scale_inv": descale, "0.bias": before["0.bias"]})
    assert torch.equal(model[0].weight.view(torch.uint8), q.view(torch.uint8))
    for wrong, match in (
        ({"0.weight": q, "0.bias": before["0.bias"]}, "got no scales"),
        ({"0.weight": q[:5], "0.bias": before["0.bias"]}, r"got \[5, 200\], expected \[300, 200\]"),
        ({"0.weight": q.view(torch.uint8), "0.bias": before["0.bias"]}, "got torch.uint8"),
        ({"0.bias": before["0.bias"]}, "Missing key.*0.weight"),
        ({**after, "0.other": q}, "Unexpected key.*0.other"),
    ):
        with pytest.raises(RuntimeError, match=match):
            model.load_state_dict(wrong)


def test_weights_made_in_inference_mode_become_ordinary_ones() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(128, 128, bias=False)).requires_grad_(False)
        quantize(model)
    assert not model[0].weight.is_inference()
    assert not model[0].weight_scale_inv.is_inference()


def test_what_cannot_be_released_says_why() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({name: nn.Linear(128, 128) for name in ("a", "b", "hooked", "mine")} | {"own": Own(128, 128)})
    model["b"].weight = model["a"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedInputError, match=r"no linear layer.*its weight is also b.weight.*mine: asked for"):
        quantize(model, keep=["mine"])
    done = quantize(model)
    assert done.quantized == ("mine",)
    assert done.kept["own"] == "it is a Own, which may read its weight in ways of its own"
    assert "hooks" in done.kept["hooked"]
    model["c"] = nn.Linear(128, 128)
    with torch.no_grad():
        model["c"].weight[0, 0] = torch.inf
    with pytest.raises(UnsupportedInputError, match=r"c.weight holds values that are not finite; nothing was changed"):
        quantize(model)
    with pytest.raises(UnsupportedInputError, match="a checkpoint needs `out`"):
        quantize("folder")  # type: ignore[call-overload]
    with pytest.raises(UnsupportedInputError, match="has no `out`"):
        quantize(model, "folder")  # type: ignore[call-overload]


def test_a_layer_whose_rows_would_be_lost_stays() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).requires_grad_(False)
    model[0].weight[7] *= 1e-8
    want = model[0](torch.ones(1, 128))
    done = quantize(model)
    assert done.kept == {"0": "1 rows of its weight would become zero beside others that are far larger"}
    assert done.quantized == ("1",)
    assert torch.equal(model[0](torch.ones(1, 128)), want)


def test_heads_and_routers_stay() -> None:
    model = tiny_model("deepseek_v3", hidden_size=256, n_routed_experts=8, num_hidden_layers=2)
    done = quantize(model)
    assert done.kept["lm_head"] == "an output head or a router"
    assert all(isinstance(model.get_submodule(path), QuantizedLinear) for path in done.quantized)


@pytest.mark.parametrize("fp8", ["off", "absorb"])
def test_attention_is_absorbed_in_blocks_as_they_are(fp8: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []
    lowered = compiler.compile_rest
    monkeypatch.setattr(compiler, "compile_rest", lambda gm, *more: graphs.append(gm) or lowered(gm, *more))
    monkeypatch.setattr(compiler, "slower_in_fp8", lambda x, weight: None)
    model = tiny_model("deepseek_v3", **ALIGNED)
    exact = with_weights_of(model)
    want = decode(exact, exact)
    got = decode(exact, torch.compile(model, backend=backend, options={"rest": "eager", "fp8": fp8}, fullgraph=True))
    assert (last_report().absorbed, last_report().refused) == (2, 0), last_report()
    assert relative(got, want) <= 1e-5, "blocks are used as they are, so both compute with the same weights"
    count = Counter(str(n.target) for n in graphs[0].graph.nodes)
    new = [n.meta["val"] for n in graphs[0].graph.find_nodes(op="placeholder") if n.name.startswith("derived")]
    if fp8 == "absorb":
        assert count["aten.bmm.default"] == 0
        assert (
            "4 products with weights (2 of 4 heads of 256 × 128, 2 of 4 heads of 128 × 256)" in last_report().notes[0]
        )
        assert {v.dtype for v in new} == {torch.float8_e4m3fn}, "no copy in the dtype of the model"
        assert len(new) == 2, "queries want rows of the other way round, outputs the weight as it lies"
    else:
        assert {v.dtype for v in new} == {torch.float32}


def test_heads_that_cut_through_blocks_are_dequantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "slower_in_fp8", lambda x, weight: None)
    model = tiny_model("deepseek_v3", **{**ALIGNED, "qk_nope_head_dim": 64})
    exact = with_weights_of(model)
    want = decode(exact, exact)
    got = decode(exact, torch.compile(model, backend=backend, options={"rest": "eager", "fp8": "absorb"}))
    assert last_report().absorbed == 2
    assert any("its blocks do not end with the heads" in note for note in last_report().notes), last_report().notes
    assert relative(got, want) <= 1e-5


def test_the_public_name_takes_both() -> None:
    assert mlacompile.quantize is quantize
