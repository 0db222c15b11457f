"""The sample of pairs: causal, as attention draws them, and the same for a seed."""

from __future__ import annotations

import pytest
import torch

from mlacompile.convert.calibrate import sample_pairs
from tests.convert.layers import random_input, random_layer


@pytest.mark.parametrize("even", [0.0, 0.5])
def test_keys_are_of_the_querys_own_window_and_not_of_its_future(even: float) -> None:
    layer, x = random_layer(), random_input(windows=3, length=20)
    pairs = sample_pairs(layer, x, queries=19, keys=8, even=even)
    assert pairs.attended == 8 - round(8 * even)
    assert pairs.token.shape == (4, 3 * 19, 8)
    window = torch.arange(3).repeat_interleave(19)[None, :, None]
    assert torch.equal(pairs.token // 20, window.expand_as(pairs.token))
    position = torch.arange(1, 20).repeat(3)[None, :, None]
    assert torch.equal(pairs.token % 20 + pairs.distance.long(), position.expand_as(pairs.token))
    assert pairs.distance.min() >= 0


def test_queries_that_see_equal_values_weigh_nothing() -> None:
    layer = random_layer()
    x = torch.ones(2, 16, 24)
    assert sample_pairs(layer, x, queries=10).weight.abs().max() < 1e-10
