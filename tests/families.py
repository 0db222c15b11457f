"""Every latent attention family of transformers as a tiny random model, however its classes are called.

Found by looking through the library for models that project keys and values up from a latent. ``testing/models.py`` has
the ones that users try first; here are all of them, those without an auto class and those inside multimodal models too.

``python -m tests.families`` measures every family, attention and cache, and prints ``docs/models.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from mlacompile import backend, last_report
from mlacompile.testing.models import FAMILIES as KNOWN

LAYERS = 2
_SPARSE = KNOWN["deepseek_v32"]
_DENSE = {k: v for k, v in KNOWN["deepseek_v3"].items() if k != "first_k_dense_replace"}
_HYBRID = {**_DENSE, "layer_types": ["linear_attention", "full_attention"], "first_k_dense_replace": 1}
_HYBRID |= {"linear_head_dim": 16, "linear_num_heads": 4, "num_local_experts": 8, "num_hidden_layers": LAYERS}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model: class names in ``transformers``, settings, how many of its layers attend to a latent.

    why: what is worth knowing about it. attn: attention implementations it has. whole: Dynamo has to be told to trace
    ops whose output has as many rows as the data say (``capture_dynamic_output_shape_ops``), or it breaks the graph.
    """

    model: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    layers: int = LAYERS
    attn: tuple[str, ...] = ("sdpa", "eager")
    whole: bool = False
    why: str = ""


def _family(prefix: str, family: str, why: str = "", **settings: Any) -> Family:
    base = {**KNOWN[family], "num_hidden_layers": LAYERS, **settings}
    return Family(f"{prefix}ForCausalLM", f"{prefix}Config", base, why=why)


FAMILIES: dict[str, Family] = {
    "deepseek_v2": _family("DeepseekV2", "deepseek_v2", "complex rope"),
    "deepseek_v3": _family("DeepseekV3", "deepseek_v3"),
    "deepseek_v32": _family("DeepseekV32", "deepseek_v32", "sparse: top-k as a mask"),
    "minicpm3": _family("MiniCPM3", "minicpm3"),
    "longcat_flash": Family(
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {**KNOWN["longcat_flash"], "num_layers": 1},
        why="two attentions a layer; the graph breaks between them",
    ),
    "glm4_moe_lite": _family("Glm4MoeLite", "glm4_moe_lite"),
    "glm_moe_dsa": _family("GlmMoeDsa", "glm_moe_dsa", "sparse: top-k as a mask"),
    "youtu": _family("Youtu", "youtu"),
    "axk1": _family("AXK1", "axk1"),
    "axk2": Family(
        "AXK2ForCausalLM",
        "AXK2Config",
        {**_SPARSE, "num_hidden_layers": LAYERS},
        why="sparse: top-k as a mask, shared by layers",
    ),
    "mistral4": Family(
        "Mistral4ForCausalLM",
        "Mistral4Config",
        {**_DENSE, "num_hidden_layers": LAYERS},
        why="queries scaled by position",
    ),
    "mistral_large4": Family(
        "MistralLarge4TextModel",
        "MistralLarge4TextConfig",
        {**_SPARSE, "num_hidden_layers": LAYERS, "q_lora_rank": None},
        why="the text model of a multimodal one; some layers share the cache of another",
    ),
    "hy_v4": Family(
        "HYV4ForCausalLM",
        "HYV4Config",
        {**_SPARSE, "num_hidden_layers": LAYERS},
        attn=("eager",),
        why="a learned sink a head; gated output",
    ),
    "dots3_note": Family(
        "Dots3NoteForCausalLM",
        "Dots3NoteTextConfig",
        {**_SPARSE, "num_hidden_layers": LAYERS, "head_dim": 48, "sliding_window": 16},
        why="the rotary key has a norm of its own; gated output; sparse",
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM", "KimiLinearConfig", _HYBRID, layers=1, why="no rope; other layers are linear attention"
    ),
    "bailing_hybrid": Family(
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        {**_HYBRID, "head_dim": 32},
        layers=1,
        why="gated output; other layers are linear attention",
    ),
    "glm5_next": Family(
        "Glm5NextTextModel",
        "Glm5NextTextConfig",
        {
            **_SPARSE,
            "num_hidden_layers": LAYERS,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
        layers=1,
        whole=True,
        why="no rope; sparse over pooled blocks; other layers are linear attention; with "
        "`torch._dynamo.config.capture_dynamic_output_shape_ops = True`, else the graph breaks inside attention",
    ),
}


def make(name: str, attn: str) -> Any:
    """A tiny random model in eval mode."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.settings)
    config._experts_implementation = "batched_mm"
    config._attn_implementation = attn
    torch.manual_seed(0)
    return getattr(transformers, family.model)(config).eval().requires_grad_(False)


CACHES = ("static", "dynamic")
PROMPT, STEPS, ROWS = 8, 3, 24
HEAD = """# Models

Every family of transformers {version} that attends to a latent, as a tiny random model: attention layers absorbed in
decode steps, of those there are, for both attention implementations and both caches of the library. Logits differ from
the uncompiled model's by at most 1e-5 of the largest. No family is named in the compiler; any other that computes the
same is found the same way. `python -m tests.families` makes this page, and a test compares it.

| family | layers | sdpa, static | sdpa, dynamic | eager, static | eager, dynamic | |
|---|---|---|---|---|---|---|
"""


def measure(name: str, attn: str, cache: str) -> tuple[int, float]:
    """Layers absorbed in decode steps, and the largest difference relative to the largest logit."""
    model = make(name, attn)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 250, (2, PROMPT + STEPS), generator=generator)

    def decode(run: Any) -> torch.Tensor:
        kind = transformers.StaticCache if cache == "static" else transformers.DynamicCache
        past = kind(config=model.config, **({"max_cache_len": ROWS} if cache == "static" else {}))
        with torch.no_grad():
            model(input_ids=tokens[:, :PROMPT], past_key_values=past)
            steps = range(PROMPT, PROMPT + STEPS)
            return torch.stack([run(input_ids=tokens[:, i : i + 1], past_key_values=past)[0] for i in steps])

    torch._dynamo.reset()
    want = decode(model)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=FAMILIES[name].whole):
        got = decode(torch.compile(model, backend=backend, options={"rest": "eager"}))
    return last_report().absorbed, float((got - want).abs().max() / want.abs().max())


def measured(name: str, attn: str, cache: str) -> tuple[str, float]:
    """A cell of the table, and the difference it was measured with."""
    if attn not in FAMILIES[name].attn:
        return "not there", 0.0
    absorbed, error = measure(name, attn, cache)
    return str(absorbed), error


def row(name: str) -> str:
    """One family's row of the table."""
    family = FAMILIES[name]
    cells = []
    for attn in ("sdpa", "eager"):
        for cache in CACHES:
            cell, error = measured(name, attn, cache)
            assert error <= 1e-5, (name, attn, cache, error)
            cells.append(cell)
    return f"| {name} | {family.layers} | {' | '.join(cells)} | {family.why} |"


if __name__ == "__main__":
    print(HEAD.format(version=".".join(transformers.__version__.split(".")[:2])), end="")
    for each in FAMILIES:
        print(row(each), flush=True)
