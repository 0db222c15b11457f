"""One layer at a time sees what it sees in the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlacompile.convert import stream
from mlacompile.convert.source import open_source
from tests.convert.conftest import VARIANTS, load

Save = Callable[..., Path]


@pytest.mark.parametrize("name", ["llama 3", "mistral, sliding window", "qwen3, biases", "gemma2"])
def test_inputs_of_attention(save: Save, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, special = VARIANTS[name]
    folder = save(family, **special)
    monkeypatch.setattr(stream, "_TOKENS_AT_ONCE", 40)
    ids = torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(0))
    wanted: list[torch.Tensor] = []
    model = load(folder)

    def keep(module: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        wanted.append(given["hidden_states"] if "hidden_states" in given else args[0])

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    model(input_ids=ids)
    got: dict[int, torch.Tensor] = {}
    stream.layer_inputs(open_source(folder), ids, got.__setitem__)
    assert list(got) == [0, 1]
    for i, x in enumerate(wanted):
        torch.testing.assert_close(got[i], x, rtol=1e-5, atol=1e-5)
    some: list[int] = []
    stream.layer_inputs(open_source(folder), ids, lambda i, x: some.append(i), layers=1)
    assert some == [0]
