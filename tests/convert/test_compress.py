"""Compression on pairs: exact where nothing has to be lost, and better than the baseline where something has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mlacompile.convert.attend import gqa_attention, mla_attention
from mlacompile.convert.calibrate import sample_pairs
from mlacompile.convert.compress import Compression, regress
from mlacompile.convert.rotate import Lanes, Pursuit, choose_frequencies, lanes_at
from mlacompile.convert.transmla import transmla
from mlacompile.errors import UnsupportedInputError
from tests.convert.layers import random_input, random_layer


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("biases", [False, True])
def test_nothing_is_lost_if_every_key_is_a_lane_and_every_value_a_latent(biases: bool) -> None:
    layer, x = random_layer(groups=2, width=8), random_input()
    if biases:
        generator = torch.Generator().manual_seed(7)
        layer = replace(
            layer,
            **{
                name: torch.randn(heads, 8, generator=generator) for name, heads in (("b_q", 4), ("b_k", 2), ("b_v", 2))
            },
            b_o=torch.randn(24, generator=generator),
        )
    lanes = Lanes(torch.eye(8, dtype=torch.complex128), layer.inv_freq.repeat(2))
    latent = Compression(layer, sample_pairs(layer, x, queries=40), lanes).to_rank(32)
    # What is left is the ridge of the regressions, 1e-4.
    assert _relative(mla_attention(latent, x), gqa_attention(layer, x)) < 2e-2


def test_better_than_the_baseline_at_the_same_cache() -> None:
    layer, x = random_layer(), random_input(windows=16, seed=1)
    unseen = random_input(windows=20, seed=1)[16:]
    flat = x.flatten(0, 1).double()
    baseline = transmla(layer, flat.T @ flat / len(flat), rope_dim=8, rank=12)
    pairs = sample_pairs(layer, x, queries=40)
    frequencies = choose_frequencies([Pursuit(pairs, layer.inv_freq)], count=4, latent=3, importance=[1.0])
    lanes = lanes_at(Pursuit(pairs, layer.inv_freq), frequencies, latent=3)
    ours = Compression(layer, pairs, lanes).to_rank(12)
    true = gqa_attention(layer, unseen)
    assert _relative(mla_attention(ours, unseen), true) < 0.8 * _relative(mla_attention(baseline, unseen), true)


def test_the_mean_of_values_costs_no_latent() -> None:
    layer, x = random_layer(), random_input()
    x = x + 3 * torch.randn(24, generator=torch.Generator().manual_seed(5))
    pairs = sample_pairs(layer, x)
    lanes = lanes_at(Pursuit(pairs, layer.inv_freq), [0, 1], latent=0)
    latent = Compression(layer, pairs, lanes).to_rank(1)
    assert latent.b_o is not None
    true = gqa_attention(layer, x)
    assert _relative(mla_attention(latent, x), true) < 0.5 * _relative(torch.zeros_like(true), true)


def test_regression_finds_the_map() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 6, generator=generator).double()
    true = torch.randn(3, 6, generator=generator).double()
    found = regress((features @ true.T).T @ features, features.T @ features, ridge=1e-12)
    torch.testing.assert_close(found, true)


def test_what_it_cannot_do_is_refused() -> None:
    layer = random_layer()
    pairs = sample_pairs(layer, random_input())
    lanes = Lanes(torch.eye(8, dtype=torch.complex128), layer.inv_freq.repeat(2))
    with pytest.raises(UnsupportedInputError, match="rank 33"):
        Compression(layer, pairs, lanes).to_rank(33)
