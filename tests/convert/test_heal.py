"""Healing: a layer alone comes nearer to its target; a whole model computes what its parts do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mlacompile.convert.attend import GroupedAttention, gqa_attention, mla_attention
from mlacompile.convert.heal import Stream, fit_layer
from mlacompile.convert.source import open_source
from mlacompile.convert.stream import Layers, load_float32
from mlacompile.convert.transmla import transmla
from tests.convert.layers import random_input, random_layer


def test_a_layer_comes_nearer_to_its_target() -> None:
    layer, x = random_layer(), random_input()
    flat = x.flatten(0, 1).double()
    latent = transmla(layer, flat.T @ flat / len(flat), rope_dim=8, rank=4)
    target, kept = gqa_attention(layer, x), latent.w_dkv.clone()
    healed = fit_layer(latent, x, target, steps=60, rate=3e-3)
    before, after = ((mla_attention(form, x) - target).square().mean() for form in (latent, healed))
    assert after < 0.8 * before
    assert not healed.w_q.requires_grad
    assert torch.equal(latent.w_dkv, kept)  # the layer that was given is not touched
    assert torch.equal(healed.inv_freq, latent.inv_freq)


def test_the_teacher_says_what_the_model_says(save: Callable[..., Path]) -> None:
    source = open_source(save())
    model = load_float32(source)
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    attention = [GroupedAttention(layer, 16) for layer in Layers(source)]
    logits = Stream(model.model, attention)(ids) @ model.lm_head.weight.T
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)
