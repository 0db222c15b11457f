"""What is asked for is checked before any work; what is made keeps within it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlacompile.convert.compression import Budget, Calibration, compress, refuse
from mlacompile.convert.families import describe
from mlacompile.convert.shelf import Shelf
from mlacompile.convert.source import open_source
from mlacompile.convert.stock import refusals, widths
from mlacompile.errors import UnsupportedInputError
from tests.convert.conftest import SIZES

Save = Callable[..., Path]
#: Caches 2 · 2 · 16 = 64 values a token and layer.
MODEL = describe({"model_type": "llama", **SIZES})


@pytest.mark.parametrize(
    ("asked", "rank", "rope_dim"),
    [
        ({"kv_budget": 1.0}, 56, 8),
        ({"kv_budget": 0.5}, 24, 8),
        ({"kv_budget": 0.25}, 12, 4),
        ({"kv_budget": 0.5, "rope_dim": 4}, 28, 4),
        ({"kv_lora_rank": 20}, 20, 8),
        ({"kv_lora_rank": 20, "rope_dim": 6}, 20, 6),
    ],
)
def test_budgets(asked: dict[str, Any], rank: int, rope_dim: int) -> None:
    budget = Budget.parse(MODEL, **asked)
    assert budget == Budget(rank, rope_dim)
    if "kv_budget" in asked:
        assert rank + rope_dim <= asked["kv_budget"] * MODEL.cache_values


def test_nothing_asked_is_nothing_lost() -> None:
    assert Budget.parse(MODEL) is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kv_budget": 0.0}, "above|over 0"),
        ({"kv_budget": -0.5}, "over 0"),
        ({"kv_budget": 1.5}, "at most 1"),
        ({"kv_budget": float("nan")}, "a share of the cache"),
        ({"kv_budget": 0.01}, "values of latent beside 2 rotary lanes; expected 1 to 64"),
        ({"kv_budget": 0.5, "kv_lora_rank": 8}, "give one of them"),
        ({"rope_dim": 8}, "needs --kv-lora-rank or --kv-budget"),
        ({"kv_lora_rank": 65}, "expected 1 to 64"),
        ({"kv_lora_rank": 0}, "expected 1 to 64"),
        ({"kv_lora_rank": 8, "rope_dim": 7}, "an even number from 2 to 32"),
        ({"kv_lora_rank": 8, "rope_dim": 34}, "an even number from 2 to 32"),
        ({"kv_lora_rank": 8, "rope_dim": 0}, "an even number from 2 to 32"),
    ],
)
def test_impossible_budgets(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        Budget.parse(MODEL, **asked)


@pytest.mark.parametrize(
    ("family", "special", "message"),
    [
        ("qwen3", {"head_dim": 16}, "normalized head by head"),
        ("gemma2", {"head_dim": 16}, "a soft cap"),
        ("mistral", {"sliding_window": 8}, "sliding window is shorter"),
    ],
)
def test_models_that_do_not_compress(family: str, special: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        refuse(describe({"model_type": family, **SIZES, **special}))


def test_calibration_needs_a_tokenizer(save: Save, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(UnsupportedInputError, match="no tokenizer there"):
        Calibration.read(open_source(save()), tmp_path / "text.txt")


def test_layers_keep_within_the_budget(save: Save, tmp_path: Path) -> None:
    windows = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []
    fitted = compress(
        open_source(save()),
        Budget(rank=16, rope_dim=8),
        Calibration(windows, windows[:1]),
        Shelf(tmp_path),
        advance=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert len(fitted.reports) == len(fitted.layers) == 2
    assert [widths(layer)[0::2] for layer in fitted.layers] == [(16, 8)] * 2
    assert not refusals(list(fitted.layers))
