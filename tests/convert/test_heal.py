"""Healing: both models say what the whole would, and the teacher writes what is asked for, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlacompile.convert import heal
from mlacompile.convert.attend import GroupedAttention
from mlacompile.convert.compression import Budget
from mlacompile.convert.distill import Progress
from mlacompile.convert.heal import Stream, heal_model
from mlacompile.convert.source import open_source
from mlacompile.convert.stream import Layers, load_float32


def test_the_teacher_says_what_the_model_says(save: Callable[..., Path]) -> None:
    source = open_source(save())
    model = load_float32(source)
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    attention = [GroupedAttention(layer, 16) for layer in Layers(source)]
    logits = Stream(model.model, attention)(ids) @ model.lm_head.weight.T
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_short_text_is_made_longer_by_the_teacher_and_nothing_but_attention_is_trained(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "_PASSAGE", 40)
    source = open_source(save())
    budget = Budget.parse(source.model, kv_budget=0.5)
    assert budget is not None
    generator = torch.Generator().manual_seed(0)
    shape = budget.shape(source.model, torch.float32, bias=True)
    layers = [
        shape.map(lambda v: v if v.device.type == "cpu" else torch.randn(v.shape, generator=generator) * 0.1)
        for _ in range(source.model.layers)
    ]
    text = torch.randint(3, 96, (900,), generator=generator)

    def run() -> Progress:
        return heal_model(
            source, layers, text, text[:128].view(2, 64), length=64, folder=tmp_path, written=160, steps=4, batch=2
        )[1]

    done = run()
    own = load_file(tmp_path / "written.safetensors")["ids"]
    assert own.shape == (160,)
    assert torch.equal(own[:32], text[:32])  # each passage goes on from a beginning of the text
    assert done.best < done.first
    assert run() == done  # and a finished run is not made again
