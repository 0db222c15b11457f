"""Which models can be converted, into what, and why not the others: decided from the configuration, before any work.

A family is known by the ``model_type`` of its config.json. All families here store their weights under Llama's names;
they differ in what stands around the attention. What the stock class of the result cannot express (``stock_lacks``) is
written with a modeling file of our own. A family that neither can express is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError

#: Families with grouped queries that convert; the value is how people call them.
FAMILIES = {
    "llama": "Llama 1 to 3, SmolLM, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
}
_LATENT_ALREADY = {
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "minicpm3",
    "longcat_flash",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "youtu",
    "axk1",
    "kimi_k2",
}
#: What is closest to converting a family that is refused.
_NEAREST = {
    "smollm3": "some of its layers have no rotary embedding; SmolLM2 converts",
    "qwen2_moe": "its experts are not carried over; the dense Qwen2 models convert",
    "qwen3_moe": "its experts are not carried over; the dense Qwen3 models convert",
    "mixtral": "its experts are not carried over; Mistral converts",
    "gemma3_text": "it has two rotary tables, one for each kind of layer; Gemma 2 converts",
    "gemma3": "it has two rotary tables and reads images; Gemma 2 converts",
    "gemma": "its norms are Gemma's with Llama's layout; Gemma 2 converts",
    "phi3": "its projections are fused, and its rotary table changes with the length; Llama and Mistral convert",
    "gpt2": "it has no rotary embedding and one head of keys for each query; models with grouped queries convert",
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class GQAModel:
    """What conversion has to know of a model with grouped queries; sizes as in ``form``."""

    family: str
    config: Any  #: the configuration as transformers reads it, with its defaults
    layers: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    inv_freq: Tensor  #: [D/2], float32
    scale: float
    tied: bool  #: the output projection is the embedding
    biases: frozenset[str]  #: which of "q", "k", "v", "o" have one
    qk_norm: bool  #: queries and keys are normalized, head by head, before the rotary embedding
    stock_lacks: tuple[str, ...]  #: what the stock class of the result cannot express; empty is best
    assumed: tuple[str, ...] = ()  #: what was concluded rather than read

    @property
    def cache_values(self) -> int:
        """Values that the source caches for one token in one layer."""
        return 2 * self.groups * self.head_dim

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint has to hold, with its shape."""
        m, d = self.hidden, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, m)}
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in self._layer_tensors(m, d).items()}
        shapes["model.norm.weight"] = (m,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, m)
        return shapes

    def _layer_tensors(self, m: int, d: int) -> dict[str, tuple[int, ...]]:
        rows = {"q": self.heads * d, "k": self.groups * d, "v": self.groups * d, "o": m}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in rows.items():
            shapes[f"self_attn.{name}_proj.weight"] = (size, m if name != "o" else self.heads * d)
            if name in self.biases:
                shapes[f"self_attn.{name}_proj.bias"] = (size,)
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
        for name in ("gate", "up", "down"):
            size = self.intermediate if name != "down" else m
            shapes[f"mlp.{name}_proj.weight"] = (size, m if name != "down" else self.intermediate)
            if getattr(self.config, "mlp_bias", False):
                shapes[f"mlp.{name}_proj.bias"] = (size,)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.family == "gemma2":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        return shapes | {f"{name}.weight": (m,) for name in norms}


def read_config(path: Path) -> dict[str, Any]:
    """The JSON of a configuration. Raises ``UnsupportedInputError`` if there is none, or no JSON object in it."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UnsupportedInputError(f"{path}: no config.json there; name one with --config, or give a whole folder")
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UnsupportedInputError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedInputError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def describe(raw: dict[str, Any], assumed: tuple[str, ...] = ()) -> GQAModel:
    """The model that a configuration describes.

    Raises:
        UnsupportedInputError: it cannot be converted; says why, and what is the nearest thing that can.
    """
    family = str(raw.get("model_type"))
    _refuse_family(family, raw)
    config = _with_defaults(family, raw)
    heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, _head_dim(config)
    if min(heads, groups, head_dim) < 1 or heads % groups or head_dim % 2:
        raise UnsupportedInputError(
            f"{heads} query heads, {groups} key and value heads of width {head_dim}: expected a whole number of query "
            "heads for each key head, and an even width"
        )
    inv_freq, rope_scale = _rotary_table(config, head_dim)
    scalar = config.query_pre_attn_scalar if family == "gemma2" else head_dim
    return GQAModel(
        family=family,
        config=config,
        layers=config.num_hidden_layers,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        inv_freq=inv_freq,
        scale=float(scalar) ** -0.5 * rope_scale**2,
        tied=bool(config.tie_word_embeddings),
        biases=_biases(family, config),
        qk_norm=family == "qwen3",
        stock_lacks=tuple(_stock_lacks(family, config)),
        assumed=assumed,
    )


def _refuse_family(family: str, raw: dict[str, Any]) -> None:
    known = "; ".join(f"{name} ({people})" for name, people in FAMILIES.items())
    if family in _LATENT_ALREADY or "kv_lora_rank" in raw:
        raise UnsupportedInputError(
            f"model_type {family} has latent attention already, there is nothing to convert: "
            'torch.compile(model, backend="mlacompile") takes it as it is'
        )
    if family not in FAMILIES:
        nearest = f": {_NEAREST[family]}" if family in _NEAREST else f"; these convert: {known}"
        raise UnsupportedInputError(f"model_type {family} does not convert{nearest}")
    if raw.get("quantization_config"):
        raise UnsupportedInputError(
            "the weights are quantized (quantization_config); convert the unquantized model, and quantize the result"
        )
    if raw.get("use_bidirectional_attention") or raw.get("is_causal") is False:
        raise UnsupportedInputError("attention in both directions has no cache; only causal models convert")


def _with_defaults(family: str, raw: dict[str, Any]) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UnsupportedInputError("conversion needs transformers: pip install 'mlacompile[convert]'") from error
    values = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map", "architectures")}
    try:
        return AutoConfig.for_model(family, **values)
    except Exception as error:
        # transformers raises everything from KeyError to its own validation errors here.
        raise UnsupportedInputError(f"transformers cannot read this {family} configuration: {error}") from error


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_table(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """The rotary frequencies [D/2], float32, and the factor that the embedding puts on queries and on keys."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind not in _ROPE_TYPES:
        raise UnsupportedInputError(
            f"rope_type {kind!r}: its frequencies change with the length of the text; expected one of {_ROPE_TYPES}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedInputError("partial_rotary_factor is not 1: heads that are rotated in part do not convert yet")
    if kind == "longrope" and rope["short_factor"] != rope["long_factor"]:
        raise UnsupportedInputError("a longrope table with different short_factor and long_factor does not convert")
    if kind == "default":
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        table, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedInputError(f"rope_parameters {rope} cannot be computed: {error!r}") from error
    return table.float(), float(factor)


def _biases(family: str, config: Any) -> frozenset[str]:
    if family == "qwen2":
        return frozenset("qkv")
    return frozenset("qkvo" if getattr(config, "attention_bias", False) else "")


def _stock_lacks(family: str, config: Any) -> list[str]:
    """What of the model around the attention a stock class with latent attention has no place for."""
    lacks = []
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    windowed = window is not None and (kinds is None or "sliding_attention" in kinds)
    if windowed and window < config.max_position_embeddings:
        lacks.append(f"a sliding window of {window} tokens")
    if family == "qwen3":
        lacks.append("queries and keys normalized head by head (qk-norm)")
    if family == "gemma2":
        lacks.append("scores and logits with a soft cap, four norms a block, and scaled embeddings")
    if getattr(config, "mlp_bias", False):
        lacks.append("MLPs with biases")
    return lacks
