"""Latent attention by strangers: every style is absorbed, and equal over twenty steps of decoding."""

from __future__ import annotations

import copy

import pytest
import torch

from mlacompile import backend, last_report
from tests.strangers import HIDDEN, STRANGERS

PROMPT = 5
#: A list that grows is another list to Dynamo at every step, and each compiles anew.
STEPS = {"weights made on the fly": 4}
#: float32 rounding of sums of a few dozen terms, relative to the largest output.
SINGLE = 1e-5
HALF = ("half precision, attention in single", "autocast")


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("style", [s for s in STRANGERS if s not in HALF])
def test_strangers_are_absorbed(style: str, dynamic: bool | None) -> None:
    make, batch = STRANGERS[style]
    torch.manual_seed(0)
    module = make().eval()
    twin = copy.deepcopy(module)
    step = torch.compile(module, backend=backend, options={"rest": "eager", "form": "absorbed"}, dynamic=dynamic)
    steps = 3 if dynamic else STEPS.get(style, 20)
    with torch.no_grad():
        for position in (0, *range(PROMPT, PROMPT + steps)):
            x = torch.randn(batch, PROMPT if position == 0 else 1, HIDDEN)
            want, got = twin(x, position), step(x, position)
            assert float((got - want).abs().max() / want.abs().max()) <= SINGLE, position
            report = last_report()
            assert (report.absorbed, report.refused) == (1, 0), report


@pytest.mark.parametrize("style", HALF)
def test_half_precision_loses_no_more_than_the_model_itself(style: str) -> None:
    """Both against the same module in float64: products in another order may round differently, not worse."""
    make, batch = STRANGERS[style]
    torch.manual_seed(0)
    module = make().eval()
    twin, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    step = torch.compile(module, backend=backend, options={"rest": "eager", "form": "absorbed"})
    lost: list[torch.Tensor] = []
    with torch.no_grad():
        for position in (0, *range(PROMPT, PROMPT + 20)):
            x = torch.randn(batch, PROMPT if position == 0 else 1, HIDDEN)
            want = exact(x.double(), position)
            lost.append(torch.stack([(y - want).square().mean() for y in (step(x, position), twin(x, position))]))
            report = last_report()
            assert (report.absorbed, report.refused) == (1, 0), report
    ours, theirs = torch.stack(lost).mean(0).sqrt()
    assert ours <= 1.25 * theirs
