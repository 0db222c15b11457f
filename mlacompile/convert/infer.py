"""A configuration for bare weights, concluded from the names and shapes of their tensors; every guess is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlacompile.errors import UnsupportedInputError


@dataclass
class InferredConfig:
    """A configuration concluded from the names and shapes of tensors; ``said`` is what has to be told."""

    raw: dict[str, Any]
    said: list[str] = field(default_factory=list)


def infer_config(
    shapes: dict[str, tuple[int, ...]], *, head_dim: int | None = None, rope_theta: float | None = None
) -> InferredConfig:
    """The most likely configuration of bare weights with Llama's names. Every guess is said.

    Widths follow from the shapes. The head width, the rotary base and epsilon do not: the head width is taken from a
    stored rotary table or norm if there is one, else from the sizes that models of this hidden size have.

    Raises:
        UnsupportedInputError: no such names, or no head width fits.
    """
    layer = "model.layers.0."
    try:
        vocab, hidden = shapes["model.embed_tokens.weight"]
        queries, keys = shapes[layer + "self_attn.q_proj.weight"][0], shapes[layer + "self_attn.k_proj.weight"][0]
        intermediate = shapes[layer + "mlp.gate_proj.weight"][0]
    except (KeyError, ValueError) as error:
        raise UnsupportedInputError(
            f"without a config.json the weights need Llama's names: {error} is not there; give --config"
        ) from error
    layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers."))
    family = _infer_family(shapes, layer)
    result = InferredConfig({"model_type": family})
    head_dim = head_dim or _infer_head_dim(shapes, layer, hidden, queries, keys, family, result.said)
    if queries % head_dim or keys % head_dim or queries // head_dim % (keys // head_dim):
        raise UnsupportedInputError(f"heads of width {head_dim} do not fit {queries} query and {keys} key rows")
    theta = rope_theta or {128256: 500000.0, 49152: 100000.0, 151936: 1000000.0}.get(vocab, 10000.0)
    if rope_theta is None:
        result.said.append(f"rope_theta {theta:g}, usual with a vocabulary of {vocab} (--rope-theta)")
    eps = 1e-6 if family in ("qwen2", "qwen3", "gemma2") else 1e-5
    result.said.append(f"rms_norm_eps {eps:g} and no rotary scaling, usual for {family}")
    result.raw |= {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": layer + "self_attn.o_proj.bias" in shapes,
        "max_position_embeddings": 8192,
        "sliding_window": None,
    }
    result.said.insert(
        0,
        f"{family}: {layers} layers, {queries // head_dim} query heads and {keys // head_dim} key heads of width "
        f"{head_dim}, hidden size {hidden}",
    )
    return result


def _infer_family(shapes: dict[str, tuple[int, ...]], layer: str) -> str:
    if layer + "pre_feedforward_layernorm.weight" in shapes:
        raise UnsupportedInputError("this looks like Gemma, whose soft caps and windows no shape tells; give --config")
    if layer + "self_attn.kv_a_proj_with_mqa.weight" in shapes:
        raise UnsupportedInputError("these weights have latent attention already; there is nothing to convert")
    if layer + "self_attn.q_norm.weight" in shapes:
        return "qwen3"
    with_bias = layer + "self_attn.q_proj.bias" in shapes and layer + "self_attn.o_proj.bias" not in shapes
    return "qwen2" if with_bias else "llama"


def _infer_head_dim(
    shapes: dict[str, tuple[int, ...]], layer: str, hidden: int, queries: int, keys: int, family: str, said: list[str]
) -> int:
    if layer + "self_attn.rotary_emb.inv_freq" in shapes:
        return 2 * shapes[layer + "self_attn.rotary_emb.inv_freq"][0]
    if layer + "self_attn.q_norm.weight" in shapes:
        return shapes[layer + "self_attn.q_norm.weight"][0]
    wide = hidden >= (1024 if family == "qwen2" else 2560)
    fitting = [d for d in ((128, 64, 32, 16) if wide else (64, 128, 32, 16)) if not queries % d and not keys % d]
    if not fitting:
        raise UnsupportedInputError(f"no usual head width divides {queries} query and {keys} key rows; give --head-dim")
    said.append(f"heads of width {fitting[0]}, usual at hidden size {hidden} (--head-dim)")
    return fitting[0]
