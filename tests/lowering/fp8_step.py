"""One decode step of a tiny model with everything in FP8, run as the graph says, by the kernels that a test has put in
place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mlacompile
from mlacompile import LatentCache
from mlacompile.testing import models

#: Weights of whole blocks: smaller ones stay as they are.
SIZES = {
    "kv_lora_rank": 256, "qk_nope_head_dim": 128, "v_head_dim": 128, "hidden_size": 256, "intermediate_size": 384
}  # fmt: skip


def fp8_model(family: str) -> Any:
    """A random model, with its queries by way of a low rank where the family has one."""
    low_rank = {} if family == "deepseek_v2" else {"q_lora_rank": 128}
    return models.build_model(models.tiny_config(family, **SIZES, **low_rank), dtype=torch.float32)


def fp8_step(model: Any, batch: int) -> tuple[list[Tensor], list[str]]:
    """Logits and all arrays of the cache after a step behind eight tokens; and the notes of the report."""
    torch._dynamo.reset()
    tokens = models.random_tokens(model.config, batch, 9)
    cache = LatentCache(model.config, max_cache_len=32)
    run = torch.compile(model, backend="mlacompile", options={"fp8": {"*": "all"}, "rest": "eager"})
    with torch.no_grad():
        model(input_ids=tokens[:, :8], past_key_values=cache)
        logits = run(input_ids=tokens[:, 8:], past_key_values=cache).logits
    arrays = [x for layer in cache.layers for x in layer.store.arrays().values()]
    return [logits, *arrays], mlacompile.last_report().notes
