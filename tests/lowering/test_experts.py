"""Experts in FP8 get the op that a CUDA graph can replay, if a kernel took them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.lowering.cudagraphs import replayable
from mlacompile.lowering.experts import place_experts
from mlacompile.ops.fp8_experts import fp8_experts
from mlacompile.ops.fp8_linear import E4M3
from tests.lowering.rewritten import willing

PLACED = torch.ops.mlacompile.fp8_experts_placed.default


def _traced(impl: str = "auto") -> GraphModule:
    def call(x: Tensor, s: Tensor, w: Tensor, d: Tensor, expert: Tensor) -> Tensor:
        return fp8_experts(x, s, w, d, expert, torch.bfloat16, impl=impl)

    with FakeTensorMode():
        x, w = torch.empty(6, 256, dtype=E4M3), torch.empty(4, 128, 256, dtype=E4M3)
        return make_fx(call)(x, torch.empty(6, 2), w, torch.empty(4, 1, 2), torch.empty(6, dtype=torch.int64))


def test_a_graph_with_a_kernel_for_them_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    willing(monkeypatch, {"fp8_experts": lambda *_: None}, name="triton")
    gm = _traced()
    assert not replayable(gm)
    assert place_experts(gm) == 1
    gm.graph.lint()
    (made,) = gm.graph.find_nodes(op="call_function", target=PLACED)
    assert made.kwargs == {"impl": "triton"}
    assert replayable(gm)
    assert place_experts(_traced("reference")) == 0, "asked for"


def test_without_one_it_stays() -> None:
    gm = _traced()
    assert place_experts(gm) == 0, "there is none on a CPU"
    assert not replayable(gm)
