"""Perplexity and divergence, on texts whose values are known."""

from __future__ import annotations

import math

import pytest
import torch

from mlacompile.convert.evaluate import measure, spread_windows
from mlacompile.errors import UnsupportedInputError


def test_knowing_nothing_costs_the_size_of_the_vocabulary() -> None:
    windows = torch.randint(0, 50, (3, 16))
    score = measure(lambda ids: torch.zeros(*ids.shape, 50), windows)
    assert score.tokens == 3 * 15
    assert math.isclose(score.perplexity, 50, rel_tol=1e-5)


def test_divergence_is_that_of_the_distributions() -> None:
    windows = torch.randint(0, 2, (2, 8))
    true = torch.tensor([0.75, 0.25]).log()
    score = measure(lambda ids: torch.zeros(*ids.shape, 2), windows, original=lambda ids: true.expand(*ids.shape, 2))
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert score.divergence is not None
    assert math.isclose(score.divergence, expected, rel_tol=1e-5)


def test_windows_are_whole_and_spread_from_first_to_last() -> None:
    windows = spread_windows(torch.arange(107), length=10, count=3)
    assert windows[:, 0].tolist() == [0, 40, 90]
    assert windows.shape == (3, 10)


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(UnsupportedInputError, match="107 tokens, which is 10 windows of 10; expected at least 12"):
        spread_windows(torch.arange(107), length=10, count=12)
