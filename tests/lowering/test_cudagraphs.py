"""Which graphs are recorded: all whose sizes are fixed, be it by the cache that the caller keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import DynamicCache

import mlacompile
from mlacompile import compiler
from mlacompile.lowering.cudagraphs import varies
from mlacompile.testing import models


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every graph that is compiled, whether its sizes vary without end."""
    found: list[bool] = []

    def record(gm: GraphModule, inputs: Sequence[Any], *_: Any) -> Any:
        found.append(varies(gm, inputs))
        return gm.forward

    monkeypatch.setattr(compiler, "compile_rest", record)
    torch._dynamo.reset()
    return found


def _step(model: Any, batch: int, context: int, queries: int = 1) -> None:
    cache = models.static_cache(model._orig_mod, batch, context, random=True)
    models.set_length(cache, context - queries)
    with torch.no_grad():
        model(input_ids=models.random_tokens(model.config, batch, queries, device="cpu"), past_key_values=cache)


@pytest.fixture
def model() -> Any:
    return torch.compile(models.tiny_model("deepseek_v3", num_hidden_layers=1), backend="mlacompile")


def test_sizes_of_a_static_cache_do_not_vary(model: Any, seen: list[bool]) -> None:
    for batch, context in ((1, 32), (1, 64), (1, 80), (1, 96), (2, 96), (3, 64), (4, 80)):
        _step(model, batch, context)
    assert not any(seen)
    assert len(seen) < 7  # so some of them were symbolic


def test_prompts_vary(model: Any, seen: list[bool]) -> None:
    _step(model, 1, 64, queries=20)
    _step(model, 1, 64, queries=30)
    assert seen == [False, True]


def test_a_cache_that_grows_varies(model: Any, seen: list[bool]) -> None:
    cache = DynamicCache(config=model.config)
    for _ in range(4):
        with torch.no_grad():
            model(input_ids=models.random_tokens(model.config, 1, 1, device="cpu"), past_key_values=cache)
    assert seen[-1]


def test_a_reset_drops_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr("torch._inductor.cudagraph_trees.reset_cudagraph_trees", lambda: called.append(True))
    mlacompile.backend.reset()
    assert called == [True]
