"""What is put on the shelf comes back, bit by bit, or is not there at all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlacompile.convert.form import MLALayer
from mlacompile.convert.shelf import Shelf
from mlacompile.errors import CheckpointError

LAYER = MLALayer(
    w_q=torch.randn(2, 5, 3),
    w_dkv=torch.randn(4, 3).bfloat16(),
    w_kr=torch.randn(2, 3),
    w_uk=torch.randn(2, 3, 4),
    w_uv=torch.randn(4, 6, 2).permute(2, 1, 0),
    w_o=torch.randn(3, 2, 6),
    b_q=None,
    b_dkv=torch.randn(4),
    b_kr=None,
    b_o=torch.randn(3),
    inv_freq=torch.rand(1),
    scale=1 / 3,
)


def test_layers_come_back(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    assert 3 not in shelf
    shelf.put(3, replace(LAYER, scale=0.5))
    shelf.put(3, LAYER)
    assert 3 in shelf
    for name, value in vars(shelf.get(3)).items():
        wanted = getattr(LAYER, name)
        if isinstance(wanted, torch.Tensor):
            assert value.dtype == wanted.dtype
            assert value.equal(wanted)
        else:
            assert value == wanted


def test_half_a_layer_is_none(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put(0, LAYER)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    assert 0 not in shelf
    with pytest.raises(CheckpointError, match="truncated"):
        shelf.get(0)
