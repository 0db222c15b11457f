"""With which settings Inductor compiles a graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import mlacompile.ops.mla_decode  # noqa: F401  (registers the op)
from mlacompile.lowering.inductor import _patches
from mlacompile.options import Options

TOGETHER = ("combo_kernels", "combo_kernels_pointwise_only")


def _decode(q: Tensor, c_kv: Tensor) -> Tensor:
    out: Tensor = torch.ops.mlacompile.mla_decode(q, None, c_kv, None, None, None, None, scale=1.0)[0]
    return out + 1


def _add(q: Tensor, c_kv: Tensor) -> Tensor:
    return q * c_kv.sum()


def _traced(function: Any, device: str) -> tuple[GraphModule, tuple[Tensor, Tensor]]:
    with FakeTensorMode():
        inputs = torch.empty(2, 4, 1, 64, device=device), torch.empty(2, 32, 64, device=device)
        return make_fx(function)(*inputs), inputs


@pytest.mark.parametrize(("function", "device", "shared"), [
    (_decode, "cuda", True), (_decode, "cpu", False), (_add, "cuda", False),
])  # fmt: skip
def test_small_kernels_of_a_decode_step_share_launches(function: Any, device: str, shared: bool) -> None:
    settings = _patches(*_traced(function, device), Options(), None)
    known = hasattr(torch._inductor.config, TOGETHER[1])
    assert [settings.get(name) for name in TOGETHER] == ([True, True] if shared and known else [None, None])


def test_without_that_setting_nothing_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm among other kernels would take four times as long."""
    traced = _traced(_decode, "cuda")
    monkeypatch.setattr(torch._inductor, "config", SimpleNamespace())
    assert not _patches(*traced, Options(), None).keys() & set(TOGETHER)
