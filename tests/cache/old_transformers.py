"""A release of transformers that caches expanded keys and values, with a LatentCache: ``python -m
tests.cache.old_transformers``, with such a release (5.14 or older) first on PYTHONPATH.

Decode steps after a prompt, against the same model in eager mode on a StaticCache. Prints a line a model and returns
how many are wrong.
"""

from __future__ import annotations

import sys

import torch
import transformers
from transformers import StaticCache

from mlacompile import LatentCache, last_report
from mlacompile.testing.models import random_tokens, tiny_model

CAPACITY, PROMPT, STEPS = 40, 12, 8


def check(family: str, attn: str, batch: int) -> bool:
    """Whether decode is absorbed, the cache holds latents alone, and the logits are equal."""
    torch._dynamo.reset()
    model, twin = tiny_model(family, attn=attn), tiny_model(family, attn=attn)
    latents = LatentCache(model.config, max_cache_len=CAPACITY)
    latents.early_initialization(batch)
    expanded = StaticCache(config=model.config, max_cache_len=CAPACITY)
    step = torch.compile(model.forward, backend="mlacompile", options={"rest": "eager"})
    tokens, error = random_tokens(model.config, batch, PROMPT + STEPS), 0.0
    with torch.no_grad():
        for first, last in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))]:
            want = twin(input_ids=tokens[:, first:last], past_key_values=expanded).logits
            got = step(input_ids=tokens[:, first:last], past_key_values=latents).logits
            error = max(error, float((got - want).abs().max() / want.abs().max()))
    store, layers = latents.latent_layers[0].store, len(latents.latent_layers)
    assert store is not None
    held = sum(x.numel() for x in store.arrays().values()) // (batch * CAPACITY)
    before = (expanded.layers[0].keys.numel() + expanded.layers[0].values.numel()) // (batch * CAPACITY)
    print(
        f"{family} {attn} batch {batch}: {last_report().summary()}, {held} elements a token and layer (StaticCache "
        f"{before}), logits equal to {error:.1e}"
    )
    return error <= 1e-5 and held == latents.rank + latents.rope and last_report().absorbed == layers


def main() -> int:
    """All of them."""
    print(f"transformers {transformers.__version__}")
    cases = [(f, a, b) for f in ("deepseek_v3", "deepseek_v2") for a in ("sdpa", "eager") for b in (1, 2)]
    return sum(not check(*case) for case in cases)


if __name__ == "__main__":
    sys.exit(main())
