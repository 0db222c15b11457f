"""Strangers once more: what is latent attention is absorbed, what is not is left as it was and said to be."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from mlacompile import backend, last_report
from tests.strangers import HIDDEN
from tests.strangers_three import MANY, NEAR, Near

SINGLE = 1e-5


def run(module: torch.nn.Module, steps: tuple[int, ...] = (5, 1, 1, 1)) -> list[tuple[int, int, str]]:
    """Compare with a twin step by step; what each report says: absorbed, refused, and why."""
    twin, step = (
        copy.deepcopy(module),
        torch.compile(module, backend=backend, options={"rest": "eager", "form": "absorbed"}),
    )
    said, position = [], 0
    with torch.no_grad():
        for length in steps:
            x = torch.randn(2, length, HIDDEN)
            want, got = twin(x, position), step(x, position)
            assert float((got - want).abs().max() / want.abs().max()) <= SINGLE, position
            report = last_report()
            said.append((report.absorbed, report.refused, " ".join(s.reason for s in report.sites)))
            position += length
    return said


@pytest.mark.parametrize("style", MANY)
def test_what_is_latent_attention_is_absorbed(style: str) -> None:
    torch.manual_seed(0)
    for absorbed, refused, why in run(MANY[style]().eval()):
        assert (absorbed, refused) == (1, 0), why


@pytest.mark.parametrize("step", NEAR)
def test_what_is_not_is_left_as_it_was(step: str) -> None:
    torch.manual_seed(0)
    for absorbed, _, why in run(Near(step).eval(), (5, 1, 1)):
        assert absorbed == 0
        assert re.search(NEAR[step], why), why
