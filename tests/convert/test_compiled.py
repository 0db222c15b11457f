"""A converted model runs on its latent cache: every layer absorbed, the same numbers, the same text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

import mlacompile
from mlacompile import LatentCache
from mlacompile.convert import convert
from mlacompile.testing.registration import ensure_registered
from tests.convert.conftest import VARIANTS, load, with_tokenizer, write_text

Save = Callable[..., Path]


@pytest.mark.parametrize("name", ["llama 3", "qwen2", "mistral, sliding window", "qwen3"])
def test_every_layer_is_absorbed(save: Save, tmp_path: Path, name: str) -> None:
    ensure_registered()
    family, special = VARIANTS[name]
    source = save(family, **special)
    done = convert(source, tmp_path / "out").report
    model, original = load(tmp_path / "out", remote_code=done["result"]["trust_remote_code"]), load(source)
    compiled = torch.compile(model, backend="mlacompile", options={"rest": "eager", "strict": True})
    prompt = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted_cache, cache = (StaticCache(config=m.config, max_cache_len=32) for m in (original, model))
    with torch.no_grad():
        token = original(input_ids=prompt, past_key_values=wanted_cache).logits[:, -1:].argmax(-1)
        model(input_ids=prompt, past_key_values=cache)
        for _ in range(6):
            wanted = original(input_ids=token, past_key_values=wanted_cache).logits
            got = compiled(input_ids=token, past_key_values=cache).logits
            assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
            token = wanted.argmax(-1)
    report = mlacompile.last_report()
    assert report.absorbed == len(model.model.layers), str(report)
    assert not report.refused
    assert [cache.layers[0].keys.shape[i] for i in (1, -1)] == [1, done["layers"][0]["rank"]]


@pytest.mark.parametrize("name", ["llama 3", "qwen3"])
def test_with_a_latent_cache_in_fp8(save: Save, tmp_path: Path, name: str) -> None:
    """Absorbed on what is stored: the same as the plain model on the same cache, and near the original."""
    ensure_registered()
    family, special = VARIANTS[name]
    source = save(family, **special)
    own = convert(source, tmp_path / "out").report["result"]["trust_remote_code"]
    model, original = load(tmp_path / "out", remote_code=own), load(source)
    compiled = torch.compile(model, backend="mlacompile", options={"rest": "eager", "strict": True})
    tokens = torch.randint(3, 96, (2, 13), generator=torch.Generator().manual_seed(0))
    caches = [LatentCache(model.config, max_cache_len=32, dtype="fp8_e4m3") for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(input_ids=tokens[:, :-1], past_key_values=cache)
        plain, got = (
            run(input_ids=tokens[:, -1:], past_key_values=cache).logits for run, cache in zip((model, compiled), caches)
        )
        wanted = original(input_ids=tokens).logits[:, -1:]
    report = mlacompile.last_report()
    assert report.absorbed == len(model.model.layers), str(report)
    assert (got - plain).abs().max() <= 1e-5 * plain.abs().max()
    # Three bits of mantissa are within 2**-4 of each value; the average over tokens is nearer than that.
    assert (got - wanted).abs().max() <= 2**-4 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [None, "fp8_e4m3"])
def test_a_smaller_cache_is_absorbed_too(save: Save, tmp_path: Path, dtype: str | None) -> None:
    ensure_registered()
    source, text = with_tokenizer(save()), write_text(tmp_path / "text.txt", 5000)
    convert(source, tmp_path / "out", kv_budget=0.5, calibrate=text)
    model = load(tmp_path / "out")
    compiled = torch.compile(model, backend="mlacompile", options={"rest": "eager", "strict": True})
    tokens = torch.randint(3, 30, (2, 13), generator=torch.Generator().manual_seed(0))

    def cache() -> StaticCache | LatentCache:
        if dtype is None:
            return StaticCache(config=model.config, max_cache_len=32)
        return LatentCache(model.config, max_cache_len=32, dtype=dtype)

    caches = [cache() for _ in range(2)]
    with torch.no_grad():
        for filled in caches:
            model(input_ids=tokens[:, :-1], past_key_values=filled)
        plain, got = (
            run(input_ids=tokens[:, -1:], past_key_values=filled).logits
            for run, filled in zip((model, compiled), caches)
        )
    report = mlacompile.last_report()
    assert report.absorbed == len(model.model.layers), str(report)
    assert (got - plain).abs().max() <= 1e-4 * plain.abs().max()
