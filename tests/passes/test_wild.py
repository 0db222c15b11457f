"""Published styles of latent attention, whole: absorbed step by step on their own caches, or rightly refused."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mlacompile import backend, last_report
from tests.wild import HIDDEN, Engine, HeldCaches, Merged, Padded, Remote, Textbook, Trainer

STEPS = (5, 1, 1, 1)
STYLES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "caches on the module, absorbed": (lambda: HeldCaches(absorb=True), STEPS),
    "training framework": (Trainer, (8,)),
    "textbook": (Textbook, STEPS),
    "textbook with rope": (lambda: Textbook(rope=True), STEPS),
    "published with a checkpoint": (lambda: Remote(cached=False), (6,)),
    "heads merged into the batch": (Merged, (6,)),
    "values padded for flash attention": (Padded, (6,)),
    "engine, one key head": (lambda: Engine(attention="gqa"), STEPS),
    "engine, keys expanded": (lambda: Engine(attention="expand"), STEPS),
    "engine, written out": (lambda: Engine(attention="matmul"), STEPS),
}
EXPANDED: dict[str, Callable[[], nn.Module]] = {
    "caches on the module": lambda: HeldCaches(absorb=False),
    "growing caches": lambda: Remote(cached=True),
}


def steps(make: Callable[[], nn.Module], lengths: tuple[int, ...], dynamic: bool | None) -> list[float]:
    """Relative error of each call on a sequence that grows."""
    torch.manual_seed(0)
    module = make().eval()
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, backend=backend, options={"rest": "eager", "form": "absorbed"}, dynamic=dynamic)
    errors, position = [], 0
    with torch.no_grad():
        for length in lengths:
            x = torch.randn(2, length, HIDDEN)
            mask = torch.full((length, position + length), float("-inf")).triu(position + 1) if length > 1 else None
            want = twin(x, position, mask)
            errors.append(float((compiled(x, position, mask) - want).abs().max() / want.abs().max()))
            position += length
    return errors


#: Where Dynamo is left to itself, lengths become symbolic from the second step on, so a style that is stepped through
#: meets symbolic lengths either way: of those, one is told in advance. ``MLACOMPILE_FULL=1`` tells all.
TOLD = ("engine, written out", *(name for name, (_, lengths) in STYLES.items() if len(lengths) == 1))
FULL = os.environ.get("MLACOMPILE_FULL") == "1"
CASES = [(s, d) for s, d in itertools.product(STYLES, (None, True)) if FULL or d is None or s in TOLD]


@pytest.mark.parametrize(("style", "dynamic"), CASES, ids=lambda x: x if x in STYLES else "symbolic" if x else "static")
def test_published_styles_are_absorbed(style: str, dynamic: bool | None) -> None:
    assert max(steps(*STYLES[style], dynamic)) <= 1e-5
    report = last_report()
    assert (report.absorbed, report.refused) == (1, 0), report


@pytest.mark.parametrize("style", EXPANDED)
def test_expanded_caches_are_refused_and_traced_to_a_latent(style: str) -> None:
    assert max(steps(EXPANDED[style], (5, 1, 1), None)) <= 1e-6
    (site,) = last_report().sites
    assert site.status == "refused"
    assert "120 values a token; what is written into it comes from 28 values a token" in site.reason


class Opaque(Trainer):
    """Attention by an op that nothing is known of: here, what its function does to scores is no mask."""

    def forward(self, x: torch.Tensor, position: int = 0, mask: torch.Tensor | None = None) -> torch.Tensor:
        q = self.wq(x).view(*x.shape[:2], 4, -1).transpose(1, 2)
        return torch.nn.attention.flex_attention.flex_attention(q, q, q, lambda score, *_: 30 * torch.tanh(score / 30))


def test_an_opaque_call_is_reported() -> None:

    steps(Opaque, (6,), None)
    (site,) = last_report().sites
    assert "flex_attention, which cannot be looked into" in site.reason
