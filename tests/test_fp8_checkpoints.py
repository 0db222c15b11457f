"""Models whose linears are FP8 already, as DeepSeek publishes them: absorbed, their weights untouched."""

from __future__ import annotations

import gc
import types
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

import mlacompile.compiler as compiler
from mlacompile import LatentCache, backend, last_report
from mlacompile.errors import UnsupportedInputError
from mlacompile.integrations.fp8_linear import batched_matmul, matmul, serve_fp8_linears
from mlacompile.lowering import derived
from mlacompile.ops.fp8_linear import fp8_dequantize_weight, fp8_linear, fp8_quantize_weight
from mlacompile.ops.fp8_quantize import fp8_quantize
from mlacompile.testing.models import random_tokens, tiny_config, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "q_lora_rank": 128,
    "kv_lora_rank": 192,
    "v_head_dim": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
}


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", None)
    serve_fp8_linears()


def in_fp8(linear: nn.Linear) -> FP8Linear:
    q, descale = fp8_quantize_weight(linear.weight)
    module = FP8Linear(linear.in_features, linear.out_features, (128, 128))
    module.weight = nn.Parameter(q, requires_grad=False)
    module.weight_scale_inv = nn.Parameter(descale, requires_grad=False)
    return module


def dequantized(module: FP8Linear) -> nn.Linear:
    linear = nn.Linear(module.in_features, module.out_features, bias=False).requires_grad_(False)
    linear.weight.copy_(fp8_dequantize_weight(module.weight, module.weight_scale_inv, torch.float32))
    return linear


def fp8_model(**sizes: Any) -> Any:
    model = tiny_model("deepseek_v3", **(sizes or SIZES))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, in_fp8(module))
    return model


def decode(model: Any, run: Any, past: Any = None) -> torch.Tensor:
    tokens = random_tokens(model.config, 2, 12)
    past = StaticCache(model.config, max_cache_len=16) if past is None else past
    with torch.no_grad():
        model(input_ids=tokens[:, :8], past_key_values=past)
        steps = [run(input_ids=tokens[:, i : i + 1], past_key_values=past).logits for i in range(8, 12)]
    return torch.cat(steps, 1)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_every_site_is_absorbed_and_only_its_up_projection_is_dequantized(
    rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []
    lowered = compiler.compile_rest
    monkeypatch.setattr(compiler, "compile_rest", lambda gm, *more: graphs.append(gm) or lowered(gm, *more))
    layers = 2 if rest == "eager" else 1  # a second one has the same kernels, and they take long to compile
    model = fp8_model(**SIZES | {"num_hidden_layers": layers})
    gc.collect()  # copies of weights that earlier tests left behind go with them
    earlier = set(derived._kept)
    want = decode(model, model)
    got = decode(model, torch.compile(model, backend=backend, options={"rest": rest}, fullgraph=True))
    assert (last_report().absorbed, last_report().refused) == (layers, 0), last_report()
    count = Counter(str(n.target) for n in graphs[0].graph.nodes)
    assert count["mlacompile.fp8_linear.default"] == layers * 7, "all but the up-projections are products in FP8 still"
    assert count["mlacompile.fp8_dequantize_weight.default"] == 0, "once a weight version, not in every step"
    kept = [values for key, values in derived._kept.items() if key not in earlier]
    up = model.model.layers[0].self_attn.kv_b_proj
    assert [tuple(t.shape) for k in kept for t in k.tensors] == [tuple(up.weight.shape)] * layers
    # Against the same weights in float32: not rounding the latent leaves less error than FP8 products have.
    for name, module in list(model.named_modules()):
        if isinstance(module, FP8Linear):
            model.set_submodule(name, dequantized(module))
    exact = decode(model, model)
    assert relative(got, exact) <= 1.25 * relative(want, exact)


def test_with_everything_else_exact_absorbed_is_exact() -> None:
    """Only the up-projections in FP8: absorbed, they act as their dequantized weights, to rounding in float32."""
    model = tiny_model("deepseek_v3", **SIZES)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = in_fp8(layer.self_attn.kv_b_proj)
    past = LatentCache(model.config, max_cache_len=16)
    compiled = torch.compile(model, backend=backend, options={"rest": "eager"})
    tokens = random_tokens(model.config, 2, 9)
    with torch.no_grad():
        model(input_ids=tokens[:, :8], past_key_values=past)
        got = compiled(input_ids=tokens[:, 8:], past_key_values=past).logits
        assert last_report().absorbed == 2
        past.crop(-1)
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj = dequantized(layer.self_attn.kv_b_proj)
        want = model(input_ids=tokens[:, 8:], past_key_values=past).logits
    assert relative(got, want) <= 1e-5


def test_a_prompt_keeps_its_products_in_fp8() -> None:
    model = fp8_model()
    compiled = torch.compile(model, backend=backend, options={"rest": "eager", "form": "expanded"})
    tokens = random_tokens(model.config, 1, 12)
    with torch.no_grad():
        past = [StaticCache(model.config, max_cache_len=16) for _ in range(2)]
        got = compiled(input_ids=tokens, past_key_values=past[0]).logits
        assert torch.equal(got, model(input_ids=tokens, past_key_values=past[1]).logits)
    assert last_report().expanded == 2


def test_the_product_takes_what_checkpoints_hold() -> None:
    x, weight = torch.randn(2, 3, 256), torch.randn(200, 256)
    q, descale = fp8_quantize_weight(weight)
    want = fp8_linear(*fp8_quantize(x.reshape(6, 256), 128, q.dtype), q, descale, torch.float32).reshape(2, 3, 200)
    assert torch.equal(matmul(x, q, descale, (128, 128)), want)
    powers = torch.exp2(torch.ceil(torch.log2(descale))).to(torch.float8_e8m0fnu)
    assert torch.equal(matmul(x, q, powers, [128, 128]), matmul(x, q, powers.float(), (128, 128)))
    single = torch.tensor(0.5)
    assert torch.equal(matmul(x, q, single), matmul(x, q, single.expand(2, 2), (128, 128)))
    got = matmul(x, q, descale, (128, 128), torch.bfloat16, activation_scale=x.abs().max() / 448)
    assert got.dtype is torch.bfloat16
    assert relative(got.float(), want) < 0.1
    with pytest.raises(UnsupportedInputError, match=r"scales of torch.uint8.*e8m0"):
        matmul(x, q, powers.view(torch.uint8), (128, 128))
    with pytest.raises(UnsupportedInputError, match=r"blocks of \(64, 64\).*expected \(128, 128\)"):
        matmul(x, q, descale, (64, 64))
    with pytest.raises(UnsupportedInputError, match=r"scales of torch.float32 \[2, 1\]; expected .* \[2, 2\]"):
        matmul(x, q, descale[:, :1], (128, 128))


def fp8_experts_module(experts: int = 5) -> FP8Experts:
    config = tiny_config("deepseek_v3", hidden_size=256, moe_intermediate_size=128, n_routed_experts=experts)
    module = FP8Experts(config, block_size=(128, 128)).requires_grad_(False)
    for name, (n, k) in (("gate_up_proj", (256, 256)), ("down_proj", (256, 128))):
        q, descale = fp8_quantize_weight(torch.randn(experts, n, k) * k**-0.5)
        setattr(module, name, nn.Parameter(q, requires_grad=False))
        setattr(module, f"{name}_scale_inv", nn.Parameter(descale, requires_grad=False))
    return module


@pytest.mark.parametrize(
    "implementation",
    [finegrained_fp8.fp8_batched_mm_experts_forward, finegrained_fp8.fp8_grouped_mm_experts_forward],
)
def test_experts_compute_the_same_in_one_product_as_one_by_one(implementation: Any) -> None:
    module, x = fp8_experts_module(), torch.randn(7, 256)
    module._is_expert_parallel = False
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])  # nobody asks for the last one
    weights = torch.rand(7, 2)
    want = FP8Experts.forward(module, x, index, weights)
    torch.testing.assert_close(implementation(module, x, index, weights), want)
    got = torch.compile(implementation, backend="eager", fullgraph=True)(module, x, index, weights)
    torch.testing.assert_close(got, want)


def test_rows_of_no_expert_are_zero_and_bad_input_is_refused() -> None:
    module, x = fp8_experts_module(), torch.randn(4, 256)
    arguments = (module.gate_up_proj, module.gate_up_proj_scale_inv, (128, 128))
    got = batched_matmul(x, *arguments, expert_ids=torch.tensor([0, 5, -1, 4]))
    assert not got[1:3].any()
    assert torch.equal(got[3:], matmul(x[3:], module.gate_up_proj[4], module.gate_up_proj_scale_inv[4], (128, 128)))
    with pytest.raises(UnsupportedInputError, match="settings static"):
        batched_matmul(x, *arguments, expert_ids=torch.zeros(4), static=True)
    with pytest.raises(UnsupportedInputError, match=r"experts \[3\] for weights \[5, 256, 256\]; expected"):
        batched_matmul(x, *arguments, expert_ids=torch.zeros(3))
    with pytest.raises(UnsupportedInputError, match=r"scales of torch.float32 \[5, 2, 1\]; expected .* \[5, 2, 2\]"):
        batched_matmul(x, arguments[0], arguments[1][..., :1], (128, 128), expert_ids=torch.zeros(4))


def test_a_model_with_experts_is_absorbed_and_keeps_them_in_fp8() -> None:
    sizes = {**SIZES, "first_k_dense_replace": 1, "moe_intermediate_size": 128, "n_routed_experts": 8}
    model = tiny_model("deepseek_v3", **sizes)
    layer = model.model.layers[1].mlp
    experts = fp8_experts_module(8)
    experts._is_expert_parallel = False
    experts.forward = types.MethodType(finegrained_fp8.fp8_batched_mm_experts_forward, experts)  # type: ignore[method-assign]
    layer.experts = experts
    want = decode(model, model)
    got = decode(model, torch.compile(model, backend=backend, options={"rest": "eager"}, fullgraph=True))
    assert last_report().absorbed == 2
    assert relative(got, want) <= 1e-4


def test_blocks_that_end_with_the_heads_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "slower_in_fp8", lambda x, weight: None)
    graphs: list[torch.fx.GraphModule] = []
    lowered = compiler.compile_rest
    monkeypatch.setattr(compiler, "compile_rest", lambda gm, *more: graphs.append(gm) or lowered(gm, *more))
    model = tiny_model("deepseek_v3", **{**SIZES, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "v_head_dim": 128})
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = in_fp8(layer.self_attn.kv_b_proj)
    past = LatentCache(model.config, max_cache_len=16)
    compiled = torch.compile(model, backend=backend, options={"rest": "eager", "fp8": "absorb"})
    tokens = random_tokens(model.config, 2, 9)
    with torch.no_grad():
        model(input_ids=tokens[:, :8], past_key_values=past)
        got = compiled(input_ids=tokens[:, 8:], past_key_values=past).logits
        past.crop(-1)
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj = dequantized(layer.self_attn.kv_b_proj)
        want = model(input_ids=tokens[:, 8:], past_key_values=past).logits
    assert relative(got, want) <= 1e-5
    new = [n.meta["val"] for n in graphs[0].graph.find_nodes(op="placeholder") if n.name.startswith("derived")]
    assert {v.dtype for v in new} == {torch.float8_e4m3fn}, "no copy in the dtype of the model"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8")
def test_on_a_gpu_every_site_is_absorbed_and_logits_are_those_of_eager_mode() -> None:
    """With a cache that rounds the latent as eager mode does on its way into the up-projection.

    That leaves nothing to differ but rounding, which quantizing activations multiplies: where a value lies between two
    of FP8, its last bit decides. In float32, with products summed in all of its bits, that decides hardly anything.
    Both are held against the same weights with nothing else rounded, too.
    """
    sizes = SIZES | {"kv_lora_rank": 512, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
    model = fp8_model(**sizes).to(DEVICE)
    tokens = random_tokens(model.config, 2, 40, device=DEVICE)

    def logits(call: Any) -> torch.Tensor:
        past = LatentCache(model.config, max_cache_len=64, dtype="fp8_e4m3")
        with torch.no_grad():
            model(input_ids=tokens[:, :32], past_key_values=past)
            steps = [call(input_ids=tokens[:, i : i + 1], past_key_values=past).logits.clone() for i in range(32, 40)]
        return torch.cat(steps, 1)

    want, got = logits(model), logits(torch.compile(model, backend=backend, fullgraph=True))
    assert (last_report().absorbed, last_report().refused) == (2, 0), last_report()
    for name, module in list(model.named_modules()):
        if isinstance(module, FP8Linear):
            model.set_submodule(name, dequantized(module).to(DEVICE))
    exact = logits(model)
    errors = {"from eager": relative(got, want), "exact": relative(got, exact), "eager": relative(want, exact)}
    print(errors)
    assert errors["from eager"] <= 2e-2, errors
    assert errors["exact"] <= 1.25 * errors["eager"], errors
