"""Small models of every family, on disk, with weights that leave nothing zero or one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mlacompile.testing import models

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}

#: Name to family, and what is special about it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, one key head, tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, biases in the MLP": ("llama", {"mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
}


def build(family: str, dtype: torch.dtype = torch.float32, **special: Any) -> PreTrainedModel:
    """A model whose norms and biases matter too."""
    config = AutoConfig.for_model(family, **{**SIZES, **special})
    model = models.build_model(config, attn="eager" if family == "gemma2" else "sdpa", seed=len(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    return model.to(dtype)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a model of a family to a folder; returns the folder."""

    def write(family: str = "llama", *, to: str = "source", shard: str = "1GB", **special: Any) -> Path:
        build(family, **special).save_pretrained(tmp_path / to, max_shard_size=shard)
        return tmp_path / to

    return write


def load(folder: Path, *, remote_code: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A folder as a user loads it."""
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, trust_remote_code=remote_code, local_files_only=True, **options
    )
    return model.eval().requires_grad_(False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a conversion but its report, which says how long it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stem != "conversion"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


_LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def write_text(file: Path, characters: int, seed: int = 0) -> Path:
    """Words that come again, so that a model has something to attend to."""
    choose = random.Random(seed)
    words = ["".join(choose.choices(_LETTERS[:26], k=choose.randint(1, 7))) for _ in range(50)]
    file.write_text(" ".join(choose.choices(words, k=characters // 2))[:characters])
    return file


def with_tokenizer(folder: Path) -> Path:
    """A token a character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {letter: i + 3 for i, letter in enumerate(_LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder
