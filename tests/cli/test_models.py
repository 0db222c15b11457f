"""The tiny models and caches that tests, benchmarks and the command line share."""

import json
from pathlib import Path

import pytest
import torch

from mlacompile.errors import UnsupportedInputError
from mlacompile.testing import models
from mlacompile.testing.timing import Timing, environment, measure


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_every_family_decodes_on_a_static_cache_on_the_meta_device(family: str) -> None:
    model = models.tiny_model(family, device="meta")
    cache = models.static_cache(model, batch=2, max_cache_len=32, length=31)
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(2, 1, dtype=torch.long, device="meta"), past_key_values=cache).logits
    assert logits.shape == (2, 1, 256)
    assert len(cache.layers) == models.attention_layers(model.config)


def test_static_cache_continues_at_the_length_it_was_given() -> None:
    model = models.tiny_model("minicpm3")
    cache = models.static_cache(model, batch=1, max_cache_len=16, length=7, random=True)
    before = [layer.keys.clone() for layer in cache.layers]
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    for layer, old in zip(cache.layers, before, strict=True):
        changed = (layer.keys != old).flatten(3).any(-1).nonzero()[:, 2].unique()
        assert changed.tolist() == [7]
        assert int(layer.cumulative_length) == 8


def test_models_are_the_same_for_the_same_seed_and_differ_otherwise() -> None:
    a, b, c = (models.tiny_model("llama", seed=seed) for seed in (1, 1, 2))
    first = [next(m.parameters()) for m in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_shorten_keeps_every_kind_of_layer() -> None:
    config = models.tiny_config("deepseek_v3", num_hidden_layers=61, first_k_dense_replace=3)
    assert models.shorten(config) == (61, 4)
    assert config.num_hidden_layers == 4
    assert models.shorten(models.tiny_config("minicpm3", num_hidden_layers=62)) == (62, 2)
    assert models.shorten(models.tiny_config("minicpm3", num_hidden_layers=1)) == (1, 1)
    assert models.shorten(models.tiny_config("minicpm3", num_hidden_layers=9), 5) == (9, 5)


def test_bad_configurations_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInputError, match="found none"):
        models.load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedInputError, match="cannot read"):
        models.load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(UnsupportedInputError, match="no_such_model"):
        models.load_config(tmp_path / "config.json")
    with pytest.raises(UnsupportedInputError, match="expected one of"):
        models.tiny_config("nobody")


def test_measure_and_environment() -> None:
    calls = []
    timing = measure(lambda: calls.append(1), warmup=2, calls=5, max_calls=7, budget_s=60)
    assert (timing.calls, len(calls)) == (7, 2 + 1 + 7)
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(2.0, 1.0, 3.0, 3)
    assert {"device", "torch", "transformers", "commit"} <= environment().keys()
