"""The result with a class of our own, where no stock class has what the model has around or inside its attention.

The class is one small file beside the checkpoint (``modeling_qwen3_mla.py`` in this folder is that file, for Qwen3;
other families differ in the names alone). It has no norm on the latent, so nothing is scaled, and any dtype will do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.convert.families import GQAModel
from mlacompile.convert.form import GQALayer, MLALayer
from mlacompile.convert.lift import interleaved
from mlacompile.convert.rope import longrope
from mlacompile.convert.stock import Biases, widths

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}
_TEMPLATE = Path(__file__).parent / "modeling_qwen3_mla.py"


def refusals(layers: list[MLALayer]) -> list[str]:
    """Why this class cannot hold these layers; empty if it can. Ranks may differ."""
    first, reasons = layers[0], []
    if any(widths(layer)[1:] != widths(first)[1:] for layer in layers):
        reasons.append("head widths that differ between layers")
    elif any(not torch.equal(layer.inv_freq, first.inv_freq) for layer in layers):
        reasons.append("rotary frequencies that differ between layers")
    if any(layer.scale != first.scale for layer in layers):
        reasons.append("scales that differ between layers")
    return reasons


def tensors(layer: MLALayer, normalized: GQALayer | None, dtype: torch.dtype, biases: Biases) -> dict[str, Tensor]:
    """The parameters of one attention module, by their names in it; norms of heads are not among them.

    Queries of a ``normalized`` layer are stored as wide as they were there, because they are normalized before they are
    put into the lanes of their group.
    """
    w_q, b_q = layer.w_q, layer.b_q
    if normalized is not None:
        order = interleaved(normalized.w_q.shape[1]).to(w_q.device)
        w_q = normalized.w_q[:, order]
        b_q = None if normalized.b_q is None else normalized.b_q[:, order]
    found = {
        "q_proj.weight": w_q.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([layer.w_dkv, layer.w_kr]),
        "kv_b_proj.weight": torch.cat([layer.w_uk, layer.w_uv], dim=1).flatten(0, 1),
        "o_proj.weight": layer.w_o.flatten(1),
    }
    if biases.any:
        found["q_proj.bias"] = w_q.new_zeros(w_q.shape[0] * w_q.shape[1]) if b_q is None else b_q.flatten()
        latent = w_q.new_zeros(layer.w_dkv.shape[0]) if layer.b_dkv is None else layer.b_dkv
        key = w_q.new_zeros(layer.w_kr.shape[0]) if layer.b_kr is None else layer.b_kr
        found["kv_a_proj_with_mqa.bias"] = torch.cat([latent, key])
        found["o_proj.bias"] = w_q.new_zeros(layer.w_o.shape[0]) if layer.b_o is None else layer.b_o
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def config(model: GQAModel, layers: list[MLALayer], dtype: torch.dtype) -> dict[str, Any]:
    """The source's configuration, with ``latent`` and what names the class."""
    first = layers[0]
    _, nope, rope, value = widths(first)
    kept = {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"}
    rope_parameters = longrope(
        first.inv_freq,
        theta=model.config.rope_parameters["rope_theta"],
        positions=model.config.max_position_embeddings,
    )
    name, file = _CLASSES[model.family], f"modeling_{model.family}_mla"
    ranks = [layer.w_dkv.shape[0] for layer in layers]
    # Under the names that other classes with latent attention have, for caches that ask.
    known = {"qk_rope_head_dim": rope} | ({"kv_lora_rank": ranks[0]} if len(set(ranks)) == 1 else {})
    return (
        kept
        | known
        | {
            "architectures": [f"{name}LatentForCausalLM"],
            "model_type": f"{model.family}_mla",
            "auto_map": {
                "AutoConfig": f"{file}.{name}LatentConfig",
                "AutoModelForCausalLM": f"{file}.{name}LatentForCausalLM",
            },
            "dtype": str(dtype).removeprefix("torch."),
            "head_dim": rope,
            "num_key_value_heads": model.heads,
            "rope_parameters": rope_parameters,
            "latent": {
                "ranks": ranks,
                "nope": nope,
                "rope": rope,
                "value": value,
                "scale": first.scale,
                "normalized_groups": model.groups if model.qk_norm else 0,
                "bias": Biases.of(layers).any,
            },
        }
    )


def modeling_file(model: GQAModel) -> tuple[str, bytes]:
    """Name and content of the file that goes beside the checkpoint."""
    text = _TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("Qwen3", _CLASSES[model.family]).replace("qwen3", model.family)
    return f"modeling_{model.family}_mla.py", text.encode()
