"""The baseline: exact when nothing is lost, worse the more is, and refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mlacompile.convert.attend import gqa_attention, mla_attention
from mlacompile.convert.transmla import transmla
from mlacompile.errors import UnsupportedInputError
from tests.convert.layers import random_input, random_layer


def _moment(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, 1).double()
    return flat.T @ flat / len(flat)


def test_exact_when_every_component_keeps_its_rotation() -> None:
    layer, x = random_layer(groups=2, width=8), random_input()
    latent = transmla(layer, _moment(x), rope_dim=16, rank=16)
    torch.testing.assert_close(mla_attention(latent, x), gqa_attention(layer, x), rtol=1e-4, atol=1e-5)


def test_folding_is_exact_for_equal_frequencies() -> None:
    layer, x = random_layer(groups=2, width=8), random_input()
    layer = replace(layer, inv_freq=torch.tensor([1.0, 1.0, 0.1, 0.1]))
    latent = transmla(layer, _moment(x), rope_dim=16, rank=16, fold=2)
    torch.testing.assert_close(mla_attention(latent, x), gqa_attention(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fold", [1, 2])
def test_exact_for_frequencies_of_zero_whatever_is_rotary(fold: int) -> None:
    layer, x = random_layer(groups=2, width=8), random_input()
    layer = replace(layer, inv_freq=torch.zeros(4))
    latent = transmla(layer, _moment(x), rope_dim=8, rank=24, fold=fold)
    torch.testing.assert_close(mla_attention(latent, x), gqa_attention(layer, x), rtol=1e-4, atol=1e-5)


def test_the_more_is_kept_the_better() -> None:
    layer, x = random_layer(), random_input()
    layer = replace(layer, inv_freq=layer.inv_freq * 0.01)
    true = gqa_attention(layer, x)
    errors = [
        (mla_attention(transmla(layer, _moment(x), rope_dim=8, rank=rank), x) - true).norm().item()
        for rank in (2, 6, 12, 24)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_the_second_calibration_is_the_one_that_truncates() -> None:
    layer, x, other = random_layer(), random_input(), random_input(seed=9)
    layer = replace(layer, inv_freq=torch.zeros(4))
    true = gqa_attention(layer, other)
    errors = [
        (mla_attention(transmla(layer, _moment(x), rope_dim=8, rank=8, partial=second), other) - true).norm()
        for second in (_moment(other), None)
    ]
    assert errors[0] < errors[1]


def test_refused_in_words() -> None:
    layer, moment = random_layer(), torch.eye(24)
    with pytest.raises(UnsupportedInputError, match="biases on keys or values"):
        transmla(replace(layer, b_k=torch.zeros(2, 8)), moment, rope_dim=8, rank=8)
    with pytest.raises(UnsupportedInputError, match="fold 3"):
        transmla(layer, moment, rope_dim=8, rank=8, fold=3)
