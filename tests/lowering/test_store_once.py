"""Rotary tables are written once: what a graph computes for every token is not computed again for every head."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from mlacompile.lowering import store_once
from mlacompile.testing import models

STORED = torch.ops.mlacompile.stored.default


def rotate(q: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """q ``[B, H, S, P]`` turned by tables that are cast and widened on their way."""
    angles = at[:, None] * torch.arange(1, 5)
    cos, sin = (f(torch.cat((angles, angles), -1)).to(q.dtype)[None, None] for f in (torch.cos, torch.sin))
    return q * cos + torch.cat((-q[..., 4:], q[..., :4]), -1) * sin


def traced(heads: int, tracing: str = "fake") -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(rotate, tracing_mode=tracing)(torch.randn(1, heads, 6, 8), torch.arange(6.0))


@pytest.mark.parametrize("tracing", ["fake", "symbolic"])
def test_tables_are_stored_before_they_meet_heads(tracing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_once, "SPREAD_OVER", 1)
    gm = traced(5, tracing)
    assert store_once.store_before_spreading(gm) == 2
    stored = gm.graph.find_nodes(op="call_function", target=STORED)
    assert [n.args[0].target for n in stored] == [torch.ops.aten.cos.default, torch.ops.aten.sin.default]
    gm.recompile()
    q, at = torch.randn(1, 5, 6, 8), torch.arange(6.0)
    torch.testing.assert_close(gm(q, at), rotate(q, at), rtol=0, atol=0)


def test_what_is_not_spread_far_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_once.store_before_spreading(traced(5)) == 0, "a step of a few values"
    monkeypatch.setattr(store_once, "SPREAD_OVER", 1)
    assert store_once.store_before_spreading(traced(2)) == 0, "computed twice at most"


def test_layers_share_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled: one table of cosines and one of sines for two layers, and no kernel of their own for copies."""
    monkeypatch.setattr(store_once, "SPREAD_OVER", 1)
    config = models.tiny_config("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=2)
    model = models.build_model(config, dtype=torch.float32, device="cpu")
    tokens = models.random_tokens(config, 1, 48, device="cpu")
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits
        # Compiled inside: this resets Dynamo first, which would not know the backend of what was compiled before.
        got, codes = run_and_get_code(
            lambda: torch.compile(model, backend="mlacompile")(input_ids=tokens, use_cache=False)
        )
    torch.testing.assert_close(got.logits, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    code = "".join(codes)
    for function in ("cos", "sin"):  # of a vector or, where one is wider than the table, of numbers one by one
        assert len(re.findall(rf"\.{function}\(\)|std::{function}\(", code)) == 1
    assert "mlacompile.stored" not in code
