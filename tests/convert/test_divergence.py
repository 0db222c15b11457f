"""The divergence through a shared head is that of the logits, and so is its gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mlacompile.convert import divergence
from mlacompile.convert.divergence import head_divergence


def test_value_and_gradient_are_those_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_ROWS", 5)  # 14 rows: whole pieces and a rest
    generator = torch.Generator().manual_seed(0)
    head, hidden, true = (
        torch.randn(*shape, 8, generator=generator, dtype=torch.float64) for shape in ((50,), (2, 7), (2, 7))
    )
    hidden.requires_grad_()
    said, wanted = (F.linear(x, head).log_softmax(-1) for x in (hidden, true))
    expected = F.kl_div(said, wanted, log_target=True, reduction="sum") / 14
    got = head_divergence(hidden, true, head)
    torch.testing.assert_close(got, expected)
    (slope,) = torch.autograd.grad(3 * expected, hidden)
    torch.testing.assert_close(torch.autograd.grad(3 * got, hidden)[0], slope)


def test_nothing_diverges_from_itself() -> None:
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    head = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    assert head_divergence(hidden, hidden, head).item() == 0.0
