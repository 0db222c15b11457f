"""Calibration: a site that FP8 spoils is found and kept, the rest is used, and a compiled model obeys the file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache
from typer.testing import CliRunner

import mlacompile.compiler as compiler
from mlacompile import Options, backend, last_report
from mlacompile.calibration import Calibration, calibrate, find_sites
from mlacompile.cli import app
from mlacompile.errors import OptionsError, UnsupportedInputError
from mlacompile.gate import Gate
from mlacompile.testing.models import random_tokens, tiny_model

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
}
#: A random model predicts nothing, so that little is at stake: budgets are smaller than for a real one.
BUDGET = 2e-3
SPOILT = "model.layers.1.mlp.down_proj"


def model_with_a_spoilt_site() -> Any:
    """A model one layer of which has huge weights for an input that is always zero: its blocks have a scale at which
    all others vanish."""
    model = tiny_model("deepseek_v3", **SIZES)
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight[0] = 0
    mlp.down_proj.weight.mul_(8)
    mlp.down_proj.weight[:, 0] = 1e6
    return model


@pytest.fixture(scope="module")
def found() -> tuple[Any, Calibration]:
    model = model_with_a_spoilt_site()
    windows = random_tokens(model.config, 3, 24)
    other = random_tokens(model.config, 2, 24, seed=1)
    return model, calibrate(model, windows, held_back=other, budget=BUDGET, site_tokens=24, turns=3)


def test_sites_are_linears_and_absorbed_attention_but_neither_head_nor_what_is_small() -> None:
    model = tiny_model("deepseek_v3", **{**SIZES, "v_head_dim": 16})
    paths = {site.key for site in find_sites(model, keep=["*.1.mlp.*"])}
    attention = {f"model.layers.{i}.self_attn" for i in range(2)}
    assert {path for path, kind in paths if kind == "absorb"} == attention
    assert ("model.layers.0.mlp.up_proj", "weights") in paths
    assert not any("layers.1.mlp" in path or path == "lm_head" for path, _ in paths)
    assert ("model.layers.0.self_attn.o_proj", "weights") not in paths, "64 inputs are less than a block"
    absorb = next(site for site in find_sites(model) if site.kind == "absorb")
    assert absorb.linears == (f"{absorb.path}.kv_b_proj",)


def test_the_spoilt_site_is_kept_and_the_rest_keeps_to_the_budget(found: tuple[Any, Calibration]) -> None:
    model, result = found
    by_key = {site.key: site for site in result.sites}
    spoilt = by_key[(SPOILT, "weights")]
    assert spoilt.output_error > 0.5, "every weight but the outliers is gone"
    others = [site for site in result.sites if site is not spoilt]
    assert all(0 < site.output_error < 0.08 for site in others)
    assert all(site.divergence < spoilt.divergence for site in others)
    assert not spoilt.safe
    assert sum(site.safe for site in result.sites) >= 0.8 * len(result.sites)
    assert result.rise <= BUDGET
    assert list(result.rises) == ["fp8", "fp8, held back", "fp8, 3 turns"]
    assert result.losses["original, 3 turns"] == pytest.approx(result.losses["original, held back"], abs=1e-5)
    assert result.losses["fp8, held back"] == pytest.approx(result.losses["original, held back"], abs=0.01)
    assert result.cache == "fp8_e4m3"
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_obeys_the_file(
    found: tuple[Any, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, result = found
    file = tmp_path / "fp8.json"
    result.write(file)
    assert Gate.read(file) == result.gate
    assert result.gate.sites[SPOILT] == "off"
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(compiler, "slower_in_fp8", lambda x, weight: None)
    past = StaticCache(model.config, max_cache_len=16)
    compiled = torch.compile(model, backend=backend, options={"rest": "eager", "fp8": str(file)})
    with torch.no_grad():
        compiled(input_ids=random_tokens(model.config, 1, 1), past_key_values=past)
    kinds = {(p.where, "absorb" if len(p.shape) == 3 else "weights"): p.left for p in last_report().products}
    for site in result.sites:
        if site.key in kinds:
            assert (kinds[site.key] is None) == site.safe, site
    assert kinds[(SPOILT, "weights")] == "fp8 is off for this source"
    assert kinds[("lm_head", "weights")] == "fp8 is off for this source", "what was not measured stays"
    assert sum(left is None for left in kinds.values()) >= 10
    torch._dynamo.reset()


def test_layers_compiled_one_by_one_have_what_all_of_them_have() -> None:
    gate = Gate(
        {"model.layers.0.mlp.up": "weights", "model.layers.1.mlp.up": "weights", "model.layers.1.mlp.down": "off"}
    )
    assert gate.mode(("file.py:3", "L['self'].mlp.up")) == "weights"
    assert gate.mode(("file.py:3", "model.layers.1.mlp.down")) == "off"
    mixed = Gate({"model.layers.0.mlp.up": "weights", "model.layers.1.mlp.up": "off"})
    assert mixed.mode(("file.py:3", "mlp.up")) == "off"


def test_a_model_without_latents_has_linears_only() -> None:
    model = tiny_model("llama", hidden_size=256, num_hidden_layers=1)
    result = calibrate(model, random_tokens(model.config, 2, 16), turns=2)
    assert {site.kind for site in result.sites} == {"weights"}
    assert result.cache is None


def test_bad_input_says_what_was_expected(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    windows = random_tokens(model.config, 1, 8)
    with pytest.raises(UnsupportedInputError, match="budget=0: expected how much perplexity may rise"):
        calibrate(model, windows, budget=0)
    with pytest.raises(UnsupportedInputError, match="no product of the model can be in FP8"):
        calibrate(model, windows, keep=["*"])
    broken = tiny_model("llama", hidden_size=256, num_hidden_layers=1)
    broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(UnsupportedInputError, match="the loss of the model on this text is nan"):
        calibrate(broken, windows)
    with pytest.raises(OptionsError, match=r"no.json.*No such file"):
        Options(fp8=str(tmp_path / "no.json"))
    for text, match in (
        ("{", "is no JSON"),
        ('{"sites": {}}', "format 'mlacompile-fp8/1'"),
        ('{"format": 1}', "format"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(OptionsError, match=match):
            Options(fp8=tmp_path / "x.json")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", hidden_size=256, num_hidden_layers=1)

    def tokenizer(text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 200 for c in text]}

    monkeypatch.setattr(sys.modules["mlacompile.cli.calibrate"], "_load", lambda *_: (model, tokenizer))
    data, out = tmp_path / "text.txt", tmp_path / "fp8.json"
    data.write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 3)
    arguments = ["calibrate", "model", "--data", str(data), "--out", str(out), "--windows", "3", "--length", "32"]
    done = CliRunner().invoke(app, [*arguments, "--turns", "2", "--budget", "0.05"])
    assert done.exit_code == 0, done.output
    assert "sites are safe" in done.output
    assert "perplexity fp8, 2 turns" in done.output
    written = json.loads(out.read_text())
    assert written["rise"]["fp8"] <= written["budget"] == 0.05
    assert all("output_error" in site["weights"] for site in written["sites"].values())
    monkeypatch.undo()
    missing = CliRunner().invoke(app, ["calibrate", str(tmp_path / "none"), "--data", str(data)])
    assert isinstance(missing.exception, UnsupportedInputError)
