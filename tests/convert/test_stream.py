"""One layer at a time computes what the whole model computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlacompile.convert.attend import GroupedAttention
from mlacompile.convert.source import open_source
from mlacompile.convert.stream import Blocks, Layers
from tests.convert.conftest import VARIANTS, load

Save = Callable[..., Path]


@pytest.mark.parametrize("name", ["llama 3", "llama, biases", "llama, yarn", "mistral", "qwen2"])
def test_layer_by_layer(save: Save, name: str) -> None:
    family, special = VARIANTS[name]
    folder = save(family, **special)
    ids = torch.randint(3, 96, (3, 16), generator=torch.Generator().manual_seed(0))
    model = load(folder)
    wanted = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    source = open_source(folder)
    blocks, layers = Blocks(source), Layers(source)
    stream = blocks.embed(ids)
    torch.testing.assert_close(stream, wanted[0], rtol=0, atol=0)
    for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        block.self_attn = GroupedAttention(layer)
        out = block(stream, position_embeddings=None)
        stream = out if isinstance(out, torch.Tensor) else out[0]
        expected = wanted[i + 1] if i + 1 < len(layers) else None
        if expected is not None:
            torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.model.norm(stream), wanted[-1], rtol=1e-4, atol=1e-4)
    assert all(p.is_meta for name, p in blocks[0].named_parameters() if name.startswith("self_attn"))
