"""The result as a stock ``deepseek_v3`` checkpoint, which transformers loads without remote code.

That class normalizes the latent, ``c / rms(c) · g``. Here the norm does nothing: stored latents are so small that
epsilon decides, ``rms = sqrt(mean(c²) + eps) = sqrt(eps)``, and g undoes the scaling. All layers are dense, so
nothing of its experts is ever built. (``youtu`` is the same attention with dense layers only, but fewer tools know it.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mlacompile.convert.families import GQAModel
from mlacompile.convert.form import MLALayer
from mlacompile.convert.rope import default_theta, longrope
from mlacompile.errors import UnsupportedInputError

MODEL_TYPE = "deepseek_v3"
#: Epsilon of the norm of the latent: fixed in the class of transformers; vLLM takes ``rms_norm_eps`` for it.
LATENT_EPS = 1e-6
#: Stored latents are this small. Their mean square is lost beside epsilon, in float32 and in bfloat16.
SHRINK = 2.0**-40
#: Pairs of cache widths (rank, rotary) that vLLM has kernels for.
VLLM_WIDTHS = ((256, 64), (512, 64))


def refusals(layers: list[MLALayer]) -> list[str]:
    """Why the stock class cannot hold these layers, which share one width and one rotary table; empty if it can."""
    first, reasons = layers[0], []
    if any(layer.w_dkv.shape[0] != first.w_dkv.shape[0] for layer in layers):
        reasons.append("ranks that differ between layers")
    if any(widths(layer)[1:] != widths(first)[1:] for layer in layers):
        reasons.append("widths that differ between layers")
    elif any(not torch.equal(layer.inv_freq, first.inv_freq) for layer in layers):
        reasons.append("rotary frequencies that differ between layers")
    if any(layer.scale != first.scale for layer in layers):
        reasons.append("scales that differ between layers")
    return reasons


def widths(layer: MLALayer) -> tuple[int, int, int, int]:
    """Rank, nope, rotary and value widths of a layer."""
    rank, nope = layer.w_dkv.shape[0], layer.w_uk.shape[1]
    return rank, nope, layer.w_kr.shape[0], layer.w_uv.shape[1]


@dataclass(frozen=True)
class Biases:
    """What any layer has: ``queries`` a bias of the queries, ``others`` one of latents, rotary keys or outputs.

    The class has all of the others or none. Queries have one only in their bottleneck, which costs a projection more.
    """

    queries: bool
    others: bool

    @classmethod
    def of(cls, layers: list[MLALayer]) -> Biases:
        others = any(bias is not None for layer in layers for bias in (layer.b_dkv, layer.b_kr, layer.b_o))
        return cls(any(layer.b_q is not None for layer in layers), others)

    @property
    def any(self) -> bool:
        return self.queries or self.others


def tensors(layer: MLALayer, dtype: torch.dtype, biases: Biases, *, scaled: bool = False) -> dict[str, Tensor]:
    """The parameters of one attention module, by their names in it.

    Args:
        layer: latent attention; meta tensors give shapes.
        dtype: of the result. Norms are float32, so that g is exact when the model runs in float32.
        biases: those of all layers.
        scaled: put the scale on the queries, for readers that know no scale but ``(N + P)**-0.5``.
    """
    gain, undo = _gains(dtype)
    w_q, b_q = layer.w_q.flatten(0, 1), None if layer.b_q is None else layer.b_q.flatten()
    if scaled:
        factor = score_factor(layer)
        w_q, b_q = w_q.float() * factor, None if b_q is None else b_q.float() * factor
    expand = torch.cat([layer.w_uk, layer.w_uv], dim=1).float() * undo
    found = {
        "kv_a_proj_with_mqa.weight": torch.cat([layer.w_dkv.to(dtype) * SHRINK, layer.w_kr.to(dtype)]),
        "kv_a_layernorm.weight": torch.full((layer.w_dkv.shape[0],), gain, device=w_q.device),
        "kv_b_proj.weight": expand.flatten(0, 1),
        "o_proj.weight": layer.w_o.flatten(1),
    }
    found |= _biases(layer, dtype) if biases.any else {}
    found |= _queries_with_bias(w_q.to(dtype), b_q) if biases.queries else {"q_proj.weight": w_q}
    return {name: tensor if name.endswith("norm.weight") else tensor.to(dtype) for name, tensor in found.items()}


def score_factor(layer: MLALayer) -> float:
    """What the scores have to be multiplied by on top of the ``(N + P)**-0.5`` of the class."""
    return layer.scale * math.sqrt(layer.w_q.shape[1])


def config(
    model: GQAModel, layer: MLALayer, dtype: torch.dtype, biases: Biases, *, engine: bool = False
) -> dict[str, Any]:
    """The configuration, for layers like ``layer``. ``engine``: only what vLLM reads, so a default rotary table."""
    rank, nope, rope, value = widths(layer)
    given, theta = model.config, model.config.rope_parameters["rope_theta"]
    positions = given.max_position_embeddings
    if engine:
        rope_parameters = {"rope_type": "default", "rope_theta": default_theta(layer.inv_freq)}
    else:
        factor = score_factor(layer) / (_query_gain() if biases.queries else 1.0)
        rope_parameters = longrope(layer.inv_freq, theta=theta, positions=positions, score_factor=factor)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "kv_lora_rank": rank,
        "q_lora_rank": _query_rank(model.hidden) if biases.queries else None,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "rope_interleave": True,
        "rope_parameters": rope_parameters,
        "rope_theta": rope_parameters["rope_theta"],
        "max_position_embeddings": positions,
        "attention_bias": biases.any,
        "attention_dropout": 0.0,
        "hidden_act": given.hidden_act,
        "rms_norm_eps": LATENT_EPS if engine else given.rms_norm_eps,
        "tie_word_embeddings": model.tied,
        "initializer_range": given.initializer_range,
        "use_cache": True,
        "bos_token_id": given.bos_token_id,
        "eos_token_id": given.eos_token_id,
        "pad_token_id": given.pad_token_id,
        # No layer has experts; the class still wants their sizes.
        "first_k_dense_replace": model.layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": model.intermediate,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


def fit_engine(layer: MLALayer) -> MLALayer:
    """The layer padded with zeros to the nearest widths that vLLM has kernels for.

    Raises:
        UnsupportedInputError: it is wider than those, has a bias or a rotary table other than the default one.
    """
    rank, _, rope, _ = widths(layer)
    fitting = [pair for pair in VLLM_WIDTHS if rank <= pair[0] and rope <= pair[1]]
    if not fitting:
        raise UnsupportedInputError(
            f"--target vllm: a cache of {rank} + {rope} values a token; vLLM has kernels for 512 + 64 and 256 + 64. "
            "Compress with --kv-lora-rank 512 --rope-dim 64, or take --target transformers"
        )
    if any(bias is not None for bias in (layer.b_q, layer.b_dkv, layer.b_kr, layer.b_o)):
        raise UnsupportedInputError("--target vllm: its class has no biases in attention, and this has")
    wide, turning = fitting[0]
    theta = default_theta(layer.inv_freq)
    missing = turning - rope
    if theta is None or missing:
        raise UnsupportedInputError(
            f"--target vllm: it takes {turning} rotary lanes in a default table; these are {rope}, with frequencies "
            f"{'of another table' if theta is None else 'of a shorter table'}. Take --target transformers, or "
            f"--rope-dim {turning} with a model without rotary scaling"
        )
    more = wide - rank
    return replace(
        layer,
        w_dkv=nn.functional.pad(layer.w_dkv, (0, 0, 0, more)),
        w_uk=nn.functional.pad(layer.w_uk, (0, more)),
        w_uv=nn.functional.pad(layer.w_uv, (0, more)),
    )


def _gains(dtype: torch.dtype) -> tuple[float, float]:
    """Weight g of the norm, and the factor on ``kv_b_proj``, whose product undoes ``SHRINK`` and epsilon.

    Both are rounded, and a pair is searched whose roundings cancel: g as bfloat16 rounds it, times the factor as
    ``dtype`` rounds it. The g that is returned is then exact in float32, and rounds to that one in bfloat16.
    """
    wanted = math.sqrt(LATENT_EPS) / SHRINK
    exponent = math.floor(math.log2(wanted))
    pairs = []
    for significand in range(128, 256):
        rounded = math.ldexp(significand / 128, exponent)
        undo = torch.tensor(wanted / rounded).to(dtype).item()
        pairs.append((abs(rounded * undo / wanted - 1.0), rounded, undo))
    _, rounded, undo = min(pairs)
    exact = torch.tensor(wanted / undo, dtype=torch.float32)
    assert exact.bfloat16().item() == rounded
    return exact.item(), undo


def _query_rank(hidden: int) -> int:
    """The hidden state and a one that carries the bias, in whole tiles."""
    return -(-(hidden + 1) // 16) * 16


def _query_gain() -> float:
    """What the norm between the two query projections multiplies by; the scale of the scores takes it back."""
    return torch.tensor(math.sqrt(LATENT_EPS) / SHRINK).bfloat16().item() * SHRINK / math.sqrt(LATENT_EPS)


def _queries_with_bias(w_q: Tensor, b_q: Tensor | None) -> dict[str, Tensor]:
    """Queries through a bottleneck that is none: the class has a bias only there.

    The first projection copies the hidden state and adds a lane that is always one; the second is the query projection,
    with its bias as the column of that lane.
    """
    hidden, rank = w_q.shape[1], _query_rank(w_q.shape[1])
    down, lane = w_q.new_zeros(rank, hidden), w_q.new_zeros(rank)
    down.fill_diagonal_(SHRINK)
    lane[hidden] = SHRINK
    up = nn.functional.pad(w_q, (0, rank - hidden))
    if b_q is not None:
        up[:, hidden] = b_q
    gain = torch.tensor(math.sqrt(LATENT_EPS) / SHRINK).bfloat16().float()
    return {
        "q_a_proj.weight": down,
        "q_a_proj.bias": lane,
        "q_a_layernorm.weight": torch.full((rank,), gain.item(), device=w_q.device),
        "q_b_proj.weight": up,
    }


def _biases(layer: MLALayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """A shrunken latent does not fit a narrow dtype, so that of the result comes first."""
    zeros = layer.w_q.to(dtype).new_zeros
    latent = zeros(layer.w_dkv.shape[0]) if layer.b_dkv is None else layer.b_dkv.to(dtype) * SHRINK
    key = zeros(layer.w_kr.shape[0]) if layer.b_kr is None else layer.b_kr.to(dtype)
    out = zeros(layer.w_o.shape[0]) if layer.b_o is None else layer.b_o
    return {"kv_a_proj_with_mqa.bias": torch.cat([latent, key]), "o_proj.bias": out}
