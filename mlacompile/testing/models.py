"""Models and caches to try things on: real Hugging Face architectures, random weights, any device, nothing downloaded.

This is the one place that knows how releases of transformers differ; it is imported by tests, benchmarks and the
command line, never by the compiler. Every function imports transformers when it is called, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mlacompile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MLA: dict[str, Any] = {
    **_BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}
_MOE: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_GROUPED: dict[str, Any] = {**_MOE, "n_group": 2, "topk_group": 1}
_INDEXED: dict[str, Any] = {
    **_GROUPED,
    "index_topk": 4096,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "head_dim": 16,
}
_LONGCAT: dict[str, Any] = {
    "num_layers": 2,
    "head_dim": 16,
    "ffn_hidden_size": 256,
    "expert_ffn_hidden_size": 64,
    "n_routed_experts": 8,
    "zero_expert_num": 4,
    "moe_topk": 2,
}

#: Small shapes for each architecture. llama is the one without a latent.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_MLA, **_MOE, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, **_GROUPED},
    "deepseek_v32": {**_MLA, **_INDEXED},
    "minicpm3": _MLA,
    "longcat_flash": {k: v for k, v in _MLA.items() if k not in ("num_hidden_layers", "intermediate_size")} | _LONGCAT,
    "glm4_moe_lite": {**_MLA, **_GROUPED},
    "glm_moe_dsa": {**_MLA, **_INDEXED},
    "youtu": _MLA,
    "axk1": {**_MLA, **_GROUPED},
    "llama": {**_BASE, "num_key_value_heads": 2},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """A small configuration of ``family`` (a transformers ``model_type``), with single values overridden."""
    from transformers import AutoConfig

    if family not in FAMILIES:
        raise UnsupportedInputError(f"unknown model family {family!r}; expected one of {', '.join(sorted(FAMILIES))}")
    return AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})


def tiny_model(
    family: str,
    *,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A small model of ``family`` with random weights, in eval mode and without gradients."""
    return build_model(tiny_config(family, **overrides), attn=attn, dtype=dtype, device=device, seed=seed)


def load_config(path: str | Path) -> Any:
    """The configuration in a folder, or in a ``config.json``. Nothing is looked up anywhere else.

    Raises:
        UnsupportedInputError: there is no such file, or transformers cannot read it; says which and why.
    """
    from transformers import AutoConfig

    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UnsupportedInputError(f"{path}: expected a config.json or a folder that holds one, found none")
    try:
        return AutoConfig.from_pretrained(str(file), local_files_only=True)
    except Exception as error:
        # transformers raises everything from KeyError to its own validation errors here.
        raise UnsupportedInputError(f"{file}: transformers cannot read this configuration: {error}") from error


def build_model(
    config: Any,
    *,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model from a configuration, its random weights made on ``device`` ("meta" too).

    Experts run as batched products, the form that every dtype takes and that compiles whole. On the meta device they
    pass their input on instead: routing needs values, which are not there, and attention does not depend on it.

    Raises:
        UnsupportedInputError: transformers has no causal language model for this configuration.
    """
    from transformers import AutoModelForCausalLM

    config._experts_implementation = "batched_mm"
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    except ValueError as error:
        first_line = str(error).splitlines()[0]
        raise UnsupportedInputError(f"cannot build a {config.model_type} model: {first_line}") from error
    if torch.device(device).type == "meta":
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child).__name__.endswith("Experts"):
                    setattr(parent, name, _PassOn())
    return model.eval().requires_grad_(False)


class _PassOn(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        return hidden_states


def attention_layers(config: Any) -> int:
    """How many attention layers a configuration asks for (LongCat has two in each of its layers)."""
    text = config.get_text_config(decoder=True)
    return 2 * text.num_layers if text.model_type == "longcat_flash" else text.num_hidden_layers


def shorten(config: Any, layers: int | None = None) -> tuple[int, int]:
    """Cut a configuration, in place, to its first layers. Returns how many layers it had and how many are left.

    ``layers=None`` keeps the shortest beginning that has every kind of layer (dense, expert, …), and at least two.
    """
    text = config.get_text_config(decoder=True)
    name = "num_layers" if text.model_type == "longcat_flash" else "num_hidden_layers"
    total = int(getattr(text, name))
    per_layer = [k for k, v in vars(text).items() if isinstance(v, (list, tuple)) and len(v) == total]
    if layers is None:
        dense = getattr(text, "first_k_dense_replace", 0) or 0
        kinds = [(i < dense, *(str(getattr(text, k)[i]) for k in per_layer)) for i in range(total)]
        layers = max(2, *(kinds.index(kind) + 1 for kind in kinds))
    kept = min(layers, total)
    if kept < total:
        setattr(text, name, kept)
        for key in per_layer:
            setattr(text, key, getattr(text, key)[:kept])
    return total, kept


def static_cache(
    model: nn.Module, batch: int, max_cache_len: int, *, length: int = 0, random: bool = False, seed: int = 0
) -> Any:
    """An allocated StaticCache for ``model`` that holds ``length`` tokens, of normal noise if ``random``, else zeros.

    One token is run through the model on a cache of a few tokens, because only the model knows what it caches: on the
    full one, it would leave memory for the expanded context behind.
    """
    from transformers import StaticCache

    device = next(model.parameters()).device
    short, cache = (StaticCache(config=model.config, max_cache_len=n) for n in (min(max_cache_len, 4), max_cache_len))
    with torch.no_grad():
        model(input_ids=torch.zeros(batch, 1, dtype=torch.long, device=device), past_key_values=short)
    for layer, seen in zip(cache.layers, short.layers, strict=True):
        layer.lazy_initialization(seen.keys, seen.values)
        if getattr(seen, "is_indexer_initialized", False):
            layer.lazy_initialization_indexer(seen.indexer_keys)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    for layer in cache.layers:
        for name in ("keys", "values"):
            buffer = getattr(layer, name, None)
            if isinstance(buffer, torch.Tensor):
                buffer.normal_(generator=generator) if random else buffer.zero_()
    set_length(cache, length)
    return cache


def set_length(cache: Any, length: int) -> None:
    """Say, in place, that a StaticCache holds ``length`` tokens: the next one is written at that position."""
    for layer in cache.layers:
        for name in ("cumulative_length", "indexer_cumulative_length"):
            value = getattr(layer, name, None)
            if isinstance(value, torch.Tensor):
                value.fill_(length)
            elif isinstance(value, int):
                setattr(layer, name, length)


def random_tokens(
    config: Any, batch: int, length: int, *, device: str | torch.device = "cpu", seed: int = 0
) -> torch.Tensor:
    """Token ids ``[batch, length]``, none of them one of the first three, which tiny models use as special tokens."""
    generator = torch.Generator("cpu").manual_seed(seed)
    vocab = config.get_text_config(decoder=True).vocab_size
    return torch.randint(3, vocab, (batch, length), generator=generator).to(device)
