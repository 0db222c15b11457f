"""The closed-form refit: never worse where it was fitted, and it finds weights that were spoilt."""

from __future__ import annotations

from dataclasses import replace

import torch

from mlacompile.convert.attend import gqa_attention, mla_attention, mla_heads
from mlacompile.convert.form import MLALayer
from mlacompile.convert.refit import OutputFit
from mlacompile.convert.transmla import transmla
from tests.convert.layers import random_input, random_layer


def test_spoilt_output_weights_are_found_again() -> None:
    layer, x = random_layer(), random_input()
    flat = x.flatten(0, 1).double()
    true = transmla(layer, flat.T @ flat / len(flat), rope_dim=8, rank=12)
    fit = OutputFit(replace(true, w_o=torch.zeros_like(true.w_o)))
    fit.add(mla_heads(true, x).flatten(0, 1), mla_attention(true, x).flatten(0, 1) + 1.0)
    found = fit.solve(ridge=1e-9)
    torch.testing.assert_close(mla_attention(found, x), mla_attention(true, x) + 1.0, rtol=1e-3, atol=1e-3)


def test_less_is_missed_and_a_bias_is_left_out_if_none_is_wanted() -> None:
    layer, x = random_layer(), random_input()
    flat = x.flatten(0, 1).double()
    latent = transmla(layer, flat.T @ flat / len(flat), rope_dim=8, rank=4)
    target = gqa_attention(layer, x) + 0.1

    def missed(candidate: MLALayer) -> float:
        return ((mla_attention(candidate, x) - target).square().sum() / target.square().sum()).item()

    errors = [missed(latent)]
    for bias in (False, True):
        fit = OutputFit(latent, bias=bias)
        for heads, wanted in zip(mla_heads(latent, x), target):
            fit.add(heads, wanted)
        found = fit.solve()
        assert (found.b_o is not None) == bias
        errors.append(missed(found))
    assert errors == sorted(errors, reverse=True)
