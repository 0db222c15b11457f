"""Lanes go where rotation matters, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import torch

from mlacompile.convert.calibrate import sample_pairs
from mlacompile.convert.rotate import Pursuit, choose_frequencies, lanes_at
from tests.convert.layers import random_input, random_layer


def test_the_frequency_that_keys_and_queries_use_is_chosen() -> None:
    layer, x = random_layer(), random_input()
    only = torch.zeros(8)
    only[[2, 6]] = 1.0  # the pair of frequency 2
    layer = replace(
        layer,
        w_k=layer.w_k * only[:, None],
        inv_freq=torch.tensor([2.9, 1.7, 0.9, 0.1]),
    )
    pursuit = Pursuit(sample_pairs(layer, x), layer.inv_freq)
    assert choose_frequencies([pursuit], count=1, latent=0, importance=[1.0]) == [2]


def test_what_hardly_turns_gets_no_lane() -> None:
    layer, x = random_layer(), random_input()
    layer = replace(layer, inv_freq=torch.tensor([1.0, 1e-7, 1e-7, 1e-7]))
    pairs = sample_pairs(layer, x)
    pursuit = Pursuit(pairs, layer.inv_freq)
    pursuit.take_latent(6)
    gains = pursuit.gains()
    assert gains[0] > 10 * gains[1:].max()


def test_each_lane_captures_more_and_lanes_are_complex_mixtures_of_all_heads() -> None:
    layer, x = random_layer(), random_input()
    pursuit = Pursuit(sample_pairs(layer, x), layer.inv_freq)
    left = []
    for index in (0, 1, 2, 3, 0):
        left.append(pursuit.residual.abs().square().sum().item())
        pursuit.take(index)
    assert left == sorted(left, reverse=True)
    lanes = pursuit.lanes()
    assert lanes.mix.shape == (5, 2 * 4)
    torch.testing.assert_close(lanes.inv_freq, layer.inv_freq[[0, 1, 2, 3, 0]])


def test_the_same_seed_chooses_the_same() -> None:
    layer, x = random_layer(), random_input()
    first, second = (
        lanes_at(Pursuit(sample_pairs(layer, x, seed=3), layer.inv_freq), [0, 1], latent=2) for _ in range(2)
    )
    assert torch.equal(first.mix, second.mix)


def test_more_lanes_than_there_are_directions_change_nothing() -> None:
    layer, x = random_layer(), random_input()
    pursuit = Pursuit(sample_pairs(layer, x), layer.inv_freq)
    pursuit.take_latent(40)  # keys have 9 directions
    assert pursuit.residual[..., -1].abs().max() < 1e-2 * pursuit.target_gram.abs().max()
    assert pursuit.residual.abs().max() <= 1.01 * pursuit.target_gram.abs().max()


def test_lanes_are_the_same_if_no_other_frequencies_are_looked_at() -> None:
    layer, x = random_layer(), random_input()
    pairs = sample_pairs(layer, x)
    every, few = (
        lanes_at(Pursuit(pairs, layer.inv_freq, only=only), [3, 1, 3], latent=2) for only in (None, [3, 1, 3])
    )
    # A lane is what it is up to a phase.
    alike = (few.mix.conj() * every.mix).sum(1).abs() / (few.mix.norm(dim=1) * every.mix.norm(dim=1))
    torch.testing.assert_close(alike, torch.ones_like(alike), rtol=0, atol=1e-3)
    assert torch.equal(few.inv_freq, every.inv_freq)
