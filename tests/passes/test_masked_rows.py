"""Queries that see nothing: where hidden scores become a finite number, they look at all tokens alike, and still do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mlacompile import backend, last_report

H, R, N, P, V, T = 3, 16, 8, 4, 6, 10
FILLS = {"finfo.min": torch.finfo(torch.float32).min, "-1e9": -1e9, "-1e4": -1e4}


class Layer(nn.Module):
    """Decode on a cache, written out: ``forward(q [B, H, S, N + P], c [B, T, R], pe [B, T, P], hidden)``."""

    def __init__(self, fill: float, spelled: str) -> None:
        super().__init__()
        self.fill, self.spelled = fill, spelled
        self.up = nn.Linear(R, H * (N + V), bias=False)

    def forward(self, q: Tensor, c: Tensor, pe: Tensor, hidden: Tensor) -> Tensor:
        k, v = self.up(c).view(*c.shape[:2], H, -1).transpose(1, 2).split([N, V], -1)
        k = torch.cat((k, pe[:, None].expand(-1, H, -1, -1)), -1)
        scores = q @ k.transpose(2, 3) * 0.25
        if self.spelled == "masked_fill":
            scores = scores.masked_fill(hidden, self.fill)
        elif self.spelled == "where":
            scores = torch.where(hidden, self.fill, scores)
        elif self.spelled == "and a bias":
            scores = (scores + torch.linspace(-1, 1, T)).masked_fill(hidden, self.fill)
        return scores.softmax(-1) @ v


def compiled_and_eager(layer: Layer, hidden: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    q, c, pe = torch.randn(2, H, queries, N + P), torch.randn(2, T, R), torch.randn(2, T, P)
    step = torch.compile(copy.deepcopy(layer), backend=backend, options={"rest": "eager", "form": "absorbed"})
    with torch.no_grad():
        return step(q, c, pe, hidden), layer(q, c, pe, hidden)


@pytest.mark.parametrize("spelled", ["masked_fill", "where", "and a bias"])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("queries", [1, 4])
def test_a_row_that_is_hidden_whole_is_the_mean_of_all_values(spelled: str, fill: str, queries: int) -> None:
    hidden = torch.rand(2, 1, queries, T, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[0, :, 0] = True
    got, want = compiled_and_eager(Layer(FILLS[fill], spelled), hidden, queries)
    assert last_report().absorbed == 1
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-5
    assert float(want[0, :, 0].abs().max()) > 1e-2  # and not nothing


@pytest.mark.parametrize("fill", [float("-inf"), -1e9], ids=str)
@pytest.mark.parametrize("spelled", ["masked_fill", "where", "nan_to_num"])
def test_a_row_that_is_hidden_whole_is_zero_where_the_model_says_so(spelled: str, fill: float) -> None:
    class Zeroed(Layer):
        def forward(self, q: Tensor, c: Tensor, pe: Tensor, hidden: Tensor) -> Tensor:
            k, v = self.up(c).view(*c.shape[:2], H, -1).transpose(1, 2).split([N, V], -1)
            k = torch.cat((k, pe[:, None].expand(-1, H, -1, -1)), -1)
            weights = (q @ k.transpose(2, 3)).masked_fill(hidden, fill).softmax(-1)
            if spelled == "nan_to_num":
                weights = weights.nan_to_num()
            elif spelled == "masked_fill":
                weights = weights.masked_fill(hidden, 0.0)
            else:
                weights = torch.where(hidden, 0.0, weights)
            return weights @ v

    hidden = torch.rand(2, 1, 4, T, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[0, :, 0] = True
    got, want = compiled_and_eager(Zeroed(fill, spelled), hidden, 4)
    assert last_report().absorbed == 1
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-5


def test_weights_set_to_zero_that_are_not_hidden_are_another_attention() -> None:
    class Dropped(Layer):
        def forward(self, q: Tensor, c: Tensor, pe: Tensor, hidden: Tensor) -> Tensor:
            k, v = self.up(c).view(*c.shape[:2], H, -1).transpose(1, 2).split([N, V], -1)
            k = torch.cat((k, pe[:, None].expand(-1, H, -1, -1)), -1)
            return (q @ k.transpose(2, 3)).softmax(-1).masked_fill(hidden, 0.0) @ v

    hidden = torch.rand(2, 1, 4, T) < 0.5
    got, want = compiled_and_eager(Dropped(0.0, ""), hidden, 4)
    assert (last_report().absorbed, last_report().refused) == (0, 1)
    assert "set to zero after the softmax" in last_report().sites[0].reason
    assert torch.equal(got, want)


class Window(nn.Module):
    """A sliding window whose hidden scores become finite: every query sees itself, so nothing has to stay a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer(-1e9, "masked_fill")

    def forward(self, q: Tensor, c: Tensor, pe: Tensor, position: Tensor) -> Tensor:
        at, token = position + torch.arange(q.shape[2])[:, None], torch.arange(T)
        return self.inner(q, c, pe, ~((token <= at) & (token > at - 3)))


@pytest.mark.parametrize("queries", [1, 3])
def test_a_window_that_is_never_empty_stays_a_range(queries: int) -> None:
    q, c, pe = torch.randn(2, H, queries, N + P), torch.randn(2, T, R), torch.randn(2, T, P)
    layer, position = Window(), torch.tensor(5)
    step = torch.compile(copy.deepcopy(layer), backend=backend, options={"rest": "eager", "form": "absorbed"})
    with torch.no_grad():
        got, want = step(q, c, pe, position), layer(q, c, pe, position)
    (site,) = last_report().sites
    assert site.status == "absorbed"
    assert "added" not in site.sees
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-5
