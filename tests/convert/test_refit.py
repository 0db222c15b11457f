"""The closed-form refit: never worse where it was fitted, and it finds weights that were spoilt."""

from __future__ import annotations

from dataclasses import replace

import torch

from mlacompile.convert.attend import gqa_attention, mla_attention
from mlacompile.convert.refit import OutputFit, widest_values
from mlacompile.convert.transmla import transmla
from tests.convert.layers import random_input, random_layer


def test_spoilt_output_weights_are_found_again() -> None:
    layer, x = random_layer(), random_input()
    flat = x.flatten(0, 1).double()
    true = transmla(layer, flat.T @ flat / len(flat), rope_dim=8, rank=12)
    fit = OutputFit(replace(true, w_o=torch.zeros_like(true.w_o)))
    fit.add(x, mla_attention(true, x) + 1.0)
    found, before, after = fit.solve(ridge=1e-9)
    assert before == 1.0
    assert after < 1e-6
    torch.testing.assert_close(mla_attention(found, x), mla_attention(true, x) + 1.0, rtol=1e-3, atol=1e-3)


def test_reported_error_is_the_measured_one() -> None:
    layer, x = random_layer(), random_input()
    flat = x.flatten(0, 1).double()
    latent = transmla(layer, flat.T @ flat / len(flat), rope_dim=8, rank=4)
    target = gqa_attention(layer, x)
    fit = OutputFit(latent)
    for part, wanted in zip(x.split(3), target.split(3)):
        fit.add(part, wanted)
    found, before, after = fit.solve()

    def missed(candidate: torch.Tensor) -> float:
        return ((candidate - target).square().sum() / target.square().sum()).item()

    assert abs(before - missed(mla_attention(latent, x))) < 1e-5
    assert abs(after - missed(mla_attention(found, x))) < 1e-5
    assert after < before


def test_value_heads_as_wide_as_a_narrow_latent_change_nothing() -> None:
    layer, x = random_layer(), random_input()
    flat = x.flatten(0, 1).double()
    latent = transmla(layer, flat.T @ flat / len(flat), rope_dim=8, rank=3)
    wide = widest_values(latent)
    assert wide.w_uv.shape == (4, 3, 3)
    torch.testing.assert_close(mla_attention(wide, x), mla_attention(latent, x), rtol=1e-5, atol=1e-5)
