"""FP8 products: which are taken and why not, what they cost in precision, and weights that change or come and go."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

import mlacompile.compiler as compiler
from mlacompile import Options, backend, explain, last_report
from mlacompile.errors import OptionsError, UnsupportedInputError
from mlacompile.lowering import derived
from mlacompile.ops.fp8_linear import WEIGHT_ONLY_ROWS, fp8_linear, fp8_quantize_weight
from mlacompile.ops.fp8_quantize import fp8_quantize
from mlacompile.testing.models import random_tokens, tiny_model

ALL = {"*": "weights"}
E4M3 = torch.float8_e4m3fn


def compiled(module: Any, fp8: Any = ALL, **options: Any) -> Callable[..., Any]:
    return torch.compile(module, backend=backend, options={"rest": "eager", "fp8": fp8, **options})


def linear_in_fp8(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """What the rewritten product should compute: few rows stay as they are."""
    rows = x.reshape(-1, x.shape[-1])
    left = (rows, None) if len(rows) <= WEIGHT_ONLY_ROWS else fp8_quantize(rows, 128, E4M3)
    out = fp8_linear(*left, *fp8_quantize_weight(linear.weight), x.dtype)
    return (out if linear.bias is None else out + linear.bias).reshape(*x.shape[:-1], -1)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Every graph that reaches the last stage."""
    seen: list[torch.fx.GraphModule] = []
    lowered = compiler.compile_rest
    monkeypatch.setattr(compiler, "compile_rest", lambda gm, *rest: seen.append(gm) or lowered(gm, *rest))
    return seen


def ops(gm: torch.fx.GraphModule) -> Counter[str]:
    return Counter(getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k", "n"), [(128, 128), (256, 384), (200, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_becomes_exactly_the_product_of_the_op(
    bias: bool, k: int, n: int, dtype: torch.dtype, rows: int
) -> None:
    linear = nn.Linear(k, n, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(2, rows, k, dtype=dtype)
    got = compiled(linear)(x)
    assert torch.equal(got, linear_in_fp8(x, linear))
    assert not torch.equal(got, linear(x))
    assert last_report().notes == (f"FP8: 1 products with weights (1 of {n} × {k})",)


class Gated(nn.Module):
    def __init__(self, wide: int = 256) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(128, wide), nn.Linear(128, wide), nn.Linear(wide, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("rows", [4, 24])
def test_products_of_one_input_are_one_and_weights_are_not_touched_in_the_graph(graphs: Any, rows: int) -> None:
    module = Gated().requires_grad_(False)
    x = torch.randn(rows, 128)
    got = compiled(module)(x)
    hidden = nn.functional.silu(linear_in_fp8(x, module.gate)) * linear_in_fp8(x, module.up)
    torch.testing.assert_close(got, linear_in_fp8(hidden, module.down))
    (graph,) = graphs
    count = ops(graph)
    assert count["fp8_quantize_reference"] == (2 if rows > WEIGHT_ONLY_ROWS else 0)
    assert count["fp8_linear.default"] == 2
    assert count["fp8_quantize_weight.default"] == count["cat.default"] == 0
    new = [n for n in graph.graph.find_nodes(op="placeholder") if n.name.startswith("derived")]
    assert [tuple(n.meta["val"].shape) for n in new] == [(512, 128), (4, 1), (128, 256), (1, 2)]
    assert [n.meta["val"].dtype for n in new] == [E4M3, torch.float32] * 2
    assert all(n.meta["tensor_dict"]["_dynamo_static_input_type"] for n in new), "CUDA graphs would copy them"
    assert last_report().notes == ("FP8: 3 products with weights (2 of 256 × 128, 1 of 128 × 256)",)


def test_products_whose_blocks_would_span_two_weights_stay_apart(graphs: Any) -> None:
    module = Gated(200).requires_grad_(False)
    x = torch.randn(4, 128)
    got = compiled(module)(x)
    hidden = nn.functional.silu(linear_in_fp8(x, module.gate)) * linear_in_fp8(x, module.up)
    torch.testing.assert_close(got, linear_in_fp8(hidden, module.down))
    assert ops(graphs[0])["fp8_linear.default"] == 3


def test_a_product_may_feed_the_next_directly() -> None:
    module, x = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128)).requires_grad_(False), torch.randn(4, 128)
    want = linear_in_fp8(linear_in_fp8(x, module[0]), module[1])
    torch.testing.assert_close(compiled(module)(x), want)
    assert "2 products with weights" in last_report().notes[0]


class Routed(nn.Module):
    """A router, an expert's product and an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert, self.head = nn.Linear(256, 128), nn.Linear(256, 256), nn.Linear(256, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).sigmoid()
        weight = scores.gather(-1, scores.topk(2).indices).sum(-1, keepdim=True)
        return self.head(x + self.expert(x) * weight).float()


def test_without_being_asked_routers_and_heads_stay_and_so_does_what_would_be_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = Routed().requires_grad_(False), torch.randn(3, 256)
    want = module(x)
    assert torch.equal(compiled(module, "weights")(x), want)
    assert not last_report().notes or "no kernel makes FP8 products faster on cpu" in " ".join(last_report().notes)
    monkeypatch.setattr("mlacompile.compiler.slower_in_fp8", lambda x, weight: None)
    torch._dynamo.reset()
    got = compiled(module, "weights")(x)
    assert last_report().notes == (
        "FP8: 1 products with weights (1 of 256 × 256)",
        "FP8: 1 products left as they were: the result is what experts or tokens are chosen by",
        "FP8: 1 products left as they were: the result leaves the graph: an output head",
    )
    assert 0 < float((got - want).abs().max()) < 0.1
    torch._dynamo.reset()
    compiled(module, ALL)(x)
    assert "3 products with weights" in last_report().notes[0], "unless they are asked for"


def test_a_weight_whose_rows_would_be_lost_stays_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlacompile.compiler.slower_in_fp8", lambda x, weight: None)
    module, x = Gated().requires_grad_(False), torch.randn(4, 128)
    module.up.weight[5] *= 1e-8
    compiled(module, "weights")(x)
    left = [p.left for p in last_report().products if p.left]
    assert "1 rows of the weight would become zero beside others that are far larger" in left
    torch._dynamo.reset()
    compiled(module, ALL)(x)
    assert all(p.left is None for p in last_report().products)


def test_a_mapping_names_single_modules_or_lines() -> None:
    module, x = Routed().requires_grad_(False), torch.randn(3, 256)
    compiled(module, {"expert": "weights"})(x)
    assert "1 products with weights (1 of 256 × 256)" in last_report().notes[0]
    torch._dynamo.reset()
    compiled(module, {"*head": "off", "*test_quantize.py:*": "weights"})(x)
    assert "2 products with weights" in last_report().notes[0]
    assert "fp8 is off for this source" in last_report().notes[1]
    torch._dynamo.reset()
    compiled(module, {"expert": "absorb", "head": "all"})(x)
    assert "1 products with weights (1 of 512 × 256)" in last_report().notes[0]
    assert any("fp8 is absorb for this source" in note for note in last_report().notes)


def test_a_weight_updated_in_place_is_quantized_again_at_the_same_address() -> None:
    linear, x = nn.Linear(128, 128).requires_grad_(False), torch.randn(2, 128)
    run = compiled(linear)
    with torch.inference_mode():
        run(x)
    (kept,) = derived._kept.values()
    addresses = [t.data_ptr() for t in kept.tensors]
    for change in (
        lambda: linear.weight.mul_(2),
        lambda: linear.load_state_dict({"weight": torch.randn(128, 128), "bias": torch.zeros(128)}),
        lambda: setattr(linear.weight, "data", torch.randn(128, 128)),
    ):
        with torch.no_grad():
            change()
            assert torch.equal(run(x), linear_in_fp8(x, linear))
    assert [t.data_ptr() for t in kept.tensors] == addresses


def test_one_graph_serves_layers_of_their_own_weights_and_two_graphs_share_a_weight() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(128, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    layers = nn.ModuleList(Layer() for _ in range(3)).requires_grad_(False)
    x = torch.randn(2, 128)
    calls = []

    def counting(gm: Any, inputs: Any, **settings: Any) -> Any:
        calls.append(gm)
        return backend(gm, inputs, **settings)

    for layer in layers:
        layer.compile(backend=counting, options={"rest": "eager", "fp8": ALL})
    for _ in range(2):
        for layer in layers:
            assert torch.equal(layer(x), linear_in_fp8(x, layer.linear))
    assert len(calls) == 1
    assert len(derived._kept) == 3
    longer = torch.cat([x] * 9)
    assert torch.equal(layers[0](longer), linear_in_fp8(longer, layers[0].linear))
    assert len(calls) == 2, "another number of rows is another graph"
    assert len(derived._kept) == 3


def test_copies_die_with_their_weights() -> None:
    gc.collect()
    before = len(derived._kept)
    linear = nn.Linear(128, 128).requires_grad_(False)
    compiled(linear)(torch.randn(2, 128))
    assert len(derived._kept) == before + 1
    torch._dynamo.reset()
    del linear
    gc.collect()
    assert len(derived._kept) == before


def test_weights_whose_changes_leave_no_trace_are_refused() -> None:
    with torch.inference_mode():
        linear = nn.Linear(128, 128).requires_grad_(False)
        with pytest.raises(UnsupportedInputError, match=r"\[128, 128\] were made in inference mode.*fp8='off'"):
            compiled(linear)(torch.randn(2, 128))


def decode(model: Any, run: Callable[..., Any]) -> torch.Tensor:
    tokens = random_tokens(model.config, 2, 10)
    past = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=tokens[:, :8], past_key_values=past)
        return torch.cat([run(input_ids=tokens[:, i : i + 1], past_key_values=past).logits for i in (8, 9)], 1)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_a_model_is_absorbed_and_quantized(rest: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "q_lora_rank": 128, "v_head_dim": 64}
    model = tiny_model("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=1, **sizes)
    want = decode(model, model)
    got = decode(model, compiled(model, ALL, rest=rest))
    assert last_report().absorbed == 1
    assert "7 products with weights" in last_report().notes[0], last_report()
    assert 0 < float((got - want).abs().max() / want.abs().max()) < 0.1
    assert (
        "7 products with weights"
        in explain(
            model,
            torch.ones(1, 1, dtype=torch.long),
            past_key_values=StaticCache(model.config, max_cache_len=16),
            options={"fp8": ALL},
        ).notes[0]
    )


@pytest.mark.parametrize(("mode", "linears", "heads"), [("weights", 7, 0), ("absorb", 0, 2), ("all", 7, 2)])
def test_modes_take_their_kind_of_product(mode: str, linears: int, heads: int, graphs: Any) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "q_lora_rank": 128, "v_head_dim": 64, "qk_nope_head_dim": 64}
    model = tiny_model("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=1, **sizes)
    want = decode(model, model)
    got = decode(model, compiled(model, {"lm_head": "off", "*": mode}))
    products = last_report().products
    taken = [p for p in products if p.left is None]
    assert sum(len(p.shape) == 2 for p in taken) == linears - (linears > 0), "but for the head"
    assert sum(len(p.shape) == 3 for p in taken) == heads
    reasons = {p.left for p in products if p.left and p.where != "lm_head"}
    assert reasons <= {f"fp8 is {mode} for this source", "weights smaller than 128 × 128"}
    assert ops(graphs[0])["bmm.default"] == 2 - heads
    assert {p.where for p in taken if len(p.shape) == 3} <= {"model.layers.0.self_attn"}
    assert 0 < float((got - want).abs().max() / want.abs().max()) < 0.1


def test_options_say_what_is_there() -> None:
    assert Options(fp8={"*q_proj": "weights", "*": "off"}).fp8["*"] == "off"
    assert Options(fp8="all").fp8 == "all"
    with pytest.raises(OptionsError, match="expected one of 'off', 'weights', 'absorb', 'all', a mapping"):
        Options(fp8={"*": "weihgts"})
    with pytest.raises(OptionsError, match="FP8 rounds more"):
        Options(fp8="weights", verify="first-call")
