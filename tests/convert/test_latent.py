"""A whole model walks layer by layer: blocks untouched, refitting pays, the result is the same every time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mlacompile.convert.attend import GroupedAttention, LatentAttention
from mlacompile.convert.latent import LayerReport, Recipe, compress_model, our_method, shared_frequencies
from tests.convert.layers import random_input, random_layer


class Block(nn.Module):
    """The least that a decoder layer is: a residual around attention and one around something else."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = random_layer(seed=seed)
        self.self_attn: nn.Module = GroupedAttention(self.layer)
        self.rest = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, position_embeddings: object = None) -> torch.Tensor:
        x = x + self.self_attn(hidden_states=nn.functional.rms_norm(x, (24,)))[0]
        return x + self.rest(x).tanh()


def _run(blocks: list[Block], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def test_a_model_of_three_layers() -> None:
    blocks = [Block(seed) for seed in range(3)]
    layers, x = [block.layer for block in blocks], random_input(windows=48)
    recipe = Recipe(rope_dim=8, rank=10, scouts=2, queries=16)
    own = [block.self_attn for block in blocks]
    method = our_method(shared_frequencies(blocks, layers, x[:40], recipe))
    reports: list[LayerReport] = []
    walk = compress_model(
        blocks, layers, x[:40], recipe, method=method, held=6, progress=lambda *done: reports.append(done[2])
    )
    latents = walk.layers
    assert [block.self_attn for block in blocks] == own
    assert all(report.missed_after_refit < report.missed_in_place for report in reports)
    assert len({tuple(latent.inv_freq.tolist()) for latent in latents}) == 1

    again = compress_model(blocks, layers, x[:40], recipe, method=method, held=6).layers
    assert all(torch.equal(a.w_dkv, b.w_dkv) and torch.equal(a.w_o, b.w_o) for a, b in zip(latents, again))

    plain = compress_model(blocks, layers, x[:40], replace(recipe, refit=False), method=method, held=6).layers
    with torch.inference_mode():
        true = _run(blocks, x[40:])
        torch.testing.assert_close(walk.original, _run(blocks, x[34:40]))
        errors = []
        for form in (plain, latents):
            for block, latent in zip(blocks, form):
                block.self_attn = LatentAttention(latent)
            errors.append((_run(blocks, x[40:]) - true).norm().item())
        torch.testing.assert_close(walk.compressed, _run(blocks, x[34:40]))
    assert errors[1] < errors[0]  # on windows that were not fitted
