"""What was brought into another form to be looked at, and is no latent attention, is put back as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from mlacompile import backend, last_report

HIDDEN, D = 24, 6


class Layer(nn.Module):
    """Latent attention (so that the graph is rewritten) behind attention of another kind."""

    def __init__(self, other: Callable[[Tensor, Tensor, Tensor], Tensor], heads: int) -> None:
        super().__init__()
        self.other, self.heads = other, heads
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * heads * D), nn.Linear(heads * D, HIDDEN)
        self.q, self.down, self.up = nn.Linear(HIDDEN, 4 * 8), nn.Linear(HIDDEN, 10), nn.Linear(10, 4 * 16)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).relu().view(b, s, self.heads, 3, D).transpose(1, 2).unbind(3)
        x = x + self.out(self.other(q, k, v).transpose(1, 2).reshape(b, s, -1))
        k, v = self.up(self.down(x)).view(b, s, 4, 16).transpose(1, 2).split(8, -1)
        return F.scaled_dot_product_attention(self.q(x).view(b, s, 4, 8).transpose(1, 2), k, v)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(y.flatten(0, 1) for y in (q, k, v))).unflatten(0, q.shape[:2])


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [F.scaled_dot_product_attention(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in range(3)]
    return torch.cat(heads, 1)


def flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("other", "call", "count"),
    [
        (merged, "scaled_dot_product_attention", 1),
        (one_by_one, "scaled_dot_product_attention", 3),
        (flexible, "higher_order.flex_attention", 1),
    ],
    ids=["three axes", "one head after the other", "flex_attention"],
)
def test_refused_attention_is_called_as_before(
    other: Callable[[Tensor, Tensor, Tensor], Tensor], call: str, count: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = Layer(other, heads=3).eval()
    options = {"rest": "eager", "form": "absorbed", "dump": tmp_path}
    step, x = torch.compile(copy.deepcopy(layer), backend=backend, options=options), torch.randn(2, 7, HIDDEN)
    with torch.no_grad():
        got, want = step(x), layer(x)
    assert (last_report().absorbed, last_report().refused) == (1, 1), last_report()
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-5
    (lowered,) = tmp_path.glob("graph*/6-lowered.py")
    text = lowered.read_text()
    assert text.count(f"torch.ops.aten.{call}.default(" if "." not in call else f"torch.ops.{call}(") == count
    assert "mlacompile.attention" not in text
