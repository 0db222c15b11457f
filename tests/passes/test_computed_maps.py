"""Up-projections that a model computes from its parameters are computed once, follow the parameters, and are shared."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mlacompile import backend, last_report
from mlacompile.lowering import derived

H, R, N, P, V, T = 3, 16, 8, 4, 6, 10


class Layer(nn.Module):
    """Keys and values through weights that are made on the way: ``forward(q, c [B, T, R], pe [B, T, P])``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.w, self.scale = nn.Parameter(torch.randn(H * (N + V), R)), nn.Parameter(torch.rand(H * (N + V), 1))
        self.a, self.b = nn.Parameter(torch.randn(4, R)), nn.Parameter(torch.randn(H * (N + V), 4))

    def forward(self, q: Tensor, c: Tensor, pe: Tensor) -> Tensor:
        if self.kind == "scaled":
            kv = nn.functional.linear(c, self.scale * self.w)
        elif self.kind == "adapter":
            kv = nn.functional.linear(c, self.w) + nn.functional.linear(nn.functional.linear(c, self.a), self.b)
        else:
            kv = nn.functional.linear(c, self.w + self.b @ self.a)
        k, v = kv.view(*c.shape[:2], H, -1).transpose(1, 2).split([N, V], -1)
        k = torch.cat((k, pe[:, None].expand(-1, H, -1, -1)), -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, H, 1, N + P), torch.randn(2, T, R), torch.randn(2, T, P)


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("kind", ["scaled", "adapter", "merged adapter"])
def test_computed_once_and_again_when_a_parameter_changes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = derived._Values._make
    monkeypatch.setattr(derived._Values, "_make", lambda self, sources: (made.append(1), make(self, sources))[1])
    torch.manual_seed(0)
    layer = Layer(kind).eval()
    step = torch.compile(
        copy.copy(layer), backend=backend, options={"rest": "eager", "form": "absorbed", "dump": tmp_path}
    )
    with torch.no_grad():
        for _ in range(3):
            x = inputs()
            assert close(step(*x), layer(*x))
        assert last_report().absorbed == 1
        first = len(made)
        assert first > 0
        layer.w.mul_(-2.0)
        x = inputs()
        assert close(step(*x), layer(*x))
        assert len(made) == 2 * first
    (lowered,) = tmp_path.glob("graph*/6-lowered.py")
    text = lowered.read_text()
    assert "derived_0" in text
    assert "aten.eye" not in text
    assert "aten.mul.Tensor(arg" not in text


def test_weights_of_inference_mode_are_used_as_they_are() -> None:
    """Nothing tells when they change, so the maps stay in the graph; the result is right either way."""
    with torch.inference_mode():
        layer = Layer("adapter").eval()
        step = torch.compile(layer, backend=backend, options={"rest": "eager", "form": "absorbed"})
        for _ in range(2):
            x = inputs()
            assert close(step(*x), layer(*x))
            layer.w.mul_(0.5)
    assert last_report().absorbed == 1
