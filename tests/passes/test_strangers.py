"""Latent attention by strangers: every style is absorbed, and equal over a prompt and some steps of decoding.

Tracing takes nearly all of the time, so each style is traced twice: its prompt, and one step for all lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from mlacompile import backend, last_report
from tests.strangers import HIDDEN, STRANGERS
from tests.strangers_two import MORE, TwoRuns

PROMPT = 5
#: Lists that grow, and functions mapped anew, are others to Dynamo at every step, and each compiles anew.
TOKEN_BY_TOKEN = ("pages and a flat batch", "rolled int8 codes")
STEPS = {"weights made on the fly": 2, "mapped over the batch": 2, "rolled int8 codes": 4, "pages and a flat batch": 4}
#: float32 rounding of sums of a few dozen terms, relative to the largest output.
SINGLE = 1e-5
ALL = {name: (make, batch, 1) for name, (make, batch) in STRANGERS.items()} | MORE
HALF = ("half precision, attention in single", "autocast")


def compiled(module: torch.nn.Module, *, dynamic: bool | None = None) -> Callable[..., torch.Tensor]:
    return torch.compile(module, backend=backend, options={"rest": "eager", "form": "absorbed"}, dynamic=dynamic)


@pytest.mark.parametrize("style", [s for s in ALL if s not in HALF])
def test_strangers_are_absorbed(style: str) -> None:
    """Compiled for the length of the prompt, and for steps of symbolic lengths."""
    make, batch, sites = ALL[style]
    torch.manual_seed(0)
    module = make().eval()
    twin = copy.deepcopy(module)
    first, later = (compiled(module, dynamic=dynamic) for dynamic in (False, True))
    prompt = 1 if style in TOKEN_BY_TOKEN else PROMPT
    with torch.no_grad():
        for position in (0, *range(prompt, prompt + STEPS.get(style, 6))):
            x = torch.randn(batch, prompt if position == 0 else 1, HIDDEN)
            want, got = twin(x, position), (later if position else first)(x, position)
            assert float((got - want).abs().max() / want.abs().max()) <= SINGLE, position
            report = last_report()
            blocks = 2 if style == "blocks of queries" and position == 0 else 1
            one_token = position + x.shape[1] == 1 and report.refused  # nothing to keep compressed yet
            assert one_token or (report.absorbed, report.refused) == (sites * blocks, 0), report


def test_runs_of_tokens_expanded_apart_are_refused_with_what_to_do() -> None:
    module = TwoRuns().eval()
    step = compiled(module)
    with torch.no_grad():
        step(torch.randn(2, PROMPT, HIDDEN), 0)
        step(torch.randn(2, 1, HIDDEN), PROMPT)
    (site,) = last_report().sites
    assert site.status == "refused"
    assert "expanded apart and joined after" in site.reason
    assert "join the latents" in site.reason


@pytest.mark.parametrize("style", HALF)
def test_half_precision_loses_no_more_than_the_model_itself(style: str) -> None:
    """Both against the same module in float64: products in another order may round differently, not worse."""
    make, batch = STRANGERS[style]
    torch.manual_seed(0)
    module = make().eval()
    twin, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    step = compiled(module)
    lost: list[torch.Tensor] = []
    with torch.no_grad():
        for position in (0, *range(PROMPT, PROMPT + 10)):
            x = torch.randn(batch, PROMPT if position == 0 else 1, HIDDEN)
            want = exact(x.double(), position)
            lost.append(torch.stack([(y - want).square().mean() for y in (step(x, position), twin(x, position))]))
            report = last_report()
            assert (report.absorbed, report.refused) == (1, 0), report
    ours, theirs = torch.stack(lost).mean(0).sqrt()
    assert ours <= 1.25 * theirs
