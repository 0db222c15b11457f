"""The whole way with a budget: a text is fitted to, the cache shrinks, the report says what that cost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlacompile import cli
from mlacompile.convert import convert, latent
from mlacompile.errors import CheckpointError, UnsupportedInputError
from tests.checkpoint.test_writer import in_a_child
from tests.convert.conftest import contents, load, with_tokenizer, write_text

Save = Callable[..., Path]


@pytest.fixture
def llama(save: Save) -> Path:
    return with_tokenizer(save())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 5800)


def test_half_a_cache(llama: Path, text: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other.txt", 3000, seed=1)
    report = convert(llama, tmp_path / "out", kv_budget=0.5, calibrate=text, evaluate=[other]).report
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == report
    assert report["method"] == "compressed"
    assert report["cache"]["kept"] == 0.5
    model = load(tmp_path / "out")
    assert model.config.model_type == "deepseek_v3"
    assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim) == (24, 8)
    assert all(0 < row["missed_after_refit"] <= row["missed_in_place"] < 1 for row in report["layers"])
    assert [loss["text"] for loss in report["losses"]] == ["validation part of the calibration text", "other.txt"]
    page = (tmp_path / "out" / "conversion.html").read_text()
    assert page.count("<svg") == 2
    assert "other.txt" in page


@pytest.mark.parametrize(("family", "special"), [("llama", {}), ("qwen2", {}), ("llama", {"attention_bias": True})])
def test_the_loss_in_the_report_is_that_of_the_files(
    save: Save, text: Path, tmp_path: Path, family: str, special: dict[str, Any]
) -> None:
    """So nothing gets lost between a fitted layer and what is loaded, biases for one."""
    source = with_tokenizer(save(family, **special))
    report = convert(source, tmp_path / "out", kv_budget=0.4, calibrate=text, evaluate=[text], dtype="float32").report
    loss = report["losses"][1]
    from mlacompile.convert.compression import Evaluation
    from mlacompile.convert.evaluate import measure
    from mlacompile.convert.source import open_source

    windows = Evaluation.read(open_source(source), text).windows
    before, after = load(source), load(tmp_path / "out")
    score = measure(lambda ids: after(input_ids=ids).logits, windows, original=lambda ids: before(input_ids=ids).logits)
    assert score.tokens == loss["tokens"]
    assert abs(score.perplexity / loss["perplexity"]["result"] - 1) < 1e-4
    assert abs(score.divergence / loss["kl"] - 1) < 1e-3
    assert loss["perplexity"]["source"] != loss["perplexity"]["result"]


def test_the_more_is_kept_the_less_is_lost(llama: Path, text: Path, tmp_path: Path) -> None:
    lost = []
    for budget in (0.2, 0.9):
        report = convert(llama, tmp_path / str(budget), kv_budget=budget, calibrate=text, dtype="float32").report
        lost.append(report["losses"][0]["kl"])
    assert lost[1] < 0.6 * lost[0]


def test_full_effort_reads_more_and_is_another_conversion(llama: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "long.txt", 12000)
    fast, full = (
        convert(llama, tmp_path / effort, kv_budget=0.5, calibrate=text, effort=effort).report
        for effort in ("fast", "full")
    )
    assert [report["options"]["effort"] for report in (fast, full)] == ["fast", "full"]
    assert fast["losses"][0]["tokens"] < full["losses"][0]["tokens"]
    assert fast["cpu_seconds"] > 0
    assert contents(tmp_path / "fast") != contents(tmp_path / "full")


def test_vllm_widths_have_no_bias_and_a_default_table(save: Save, text: Path, tmp_path: Path) -> None:
    from mlacompile.convert.rope import default_theta

    source = with_tokenizer(save(head_dim=128, num_attention_heads=2, num_key_value_heads=2))
    convert(source, tmp_path / "out", kv_lora_rank=256, rope_dim=64, calibrate=text, target="vllm", dtype="float32")
    model = load(tmp_path / "out")
    assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim, model.config.attention_bias) == (256, 64, False)
    assert model.config.rope_parameters["rope_type"] == "default"
    assert default_theta(model.model.rotary_emb.inv_freq) is not None


def test_a_text_alone_measures_a_lossless_conversion(llama: Path, text: Path, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "out", evaluate=[text], lossless=True).report
    assert report["method"] == "lossless"
    (loss,) = report["losses"]
    assert abs(loss["kl"]) < 1e-6
    assert abs(loss["perplexity"]["result"] / loss["perplexity"]["source"] - 1) < 1e-5


def test_killed_and_gone_on_with_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(llama, tmp_path / "whole", kv_budget=0.5, calibrate=text)
    put = latent.Shelf.put

    def put_and_wait(self: Any, i: int, *rest: Any) -> None:
        put(self, i, *rest)
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(latent.Shelf, "put", put_and_wait)
        child = in_a_child(lambda: convert(llama, tmp_path / "out", kv_budget=0.5, calibrate=text))
        layer = tmp_path / "out.partial" / "scratch" / "layer-00000.safetensors"
        until = time.monotonic() + 60
        while not layer.exists() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert layer.exists()
    assert not (tmp_path / "out").exists()
    heard: list[str] = []
    convert(llama, tmp_path / "out", kv_budget=0.5, calibrate=text, say=heard.append)
    assert any("an earlier run has compressed" in line for line in heard)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_another_text_starts_anew(llama: Path, text: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "out", kv_budget=0.5, calibrate=text, advance=stop)
    other = write_text(tmp_path / "other.txt", 5000, seed=1)
    heard: list[str] = []
    convert(llama, tmp_path / "out", kv_budget=0.5, calibrate=other, say=heard.append)
    assert not any("earlier run" in line for line in heard)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_budget": 0.5}, "--kv-budget needs --calibrate"),
        ({"kv_lora_rank": 8, "rope_dim": 8}, "--kv-lora-rank needs --calibrate"),
        ({"lossless": True, "kv_budget": 0.5}, "--lossless keeps everything, --kv-budget does not"),
        ({"lossless": True, "calibrate": "text.txt"}, "--lossless keeps everything, --calibrate does not"),
        ({"evaluate": ["empty.txt"]}, "empty.txt: empty"),
        ({"heal": 1.0}, "nothing is to heal where nothing is lost"),
        ({"effort": "some", "kv_budget": 0.5, "calibrate": "text.txt"}, "effort 'some': expected one of fast, full"),
        ({"heal": -1.0, "kv_budget": 0.5, "calibrate": "text.txt"}, "expected minutes"),
        ({"kv_budget": 1.5, "calibrate": "text.txt"}, "at most 1"),
        ({"kv_lora_rank": 65, "calibrate": "text.txt"}, "expected 1 to 64"),
        ({"kv_budget": 0.5, "calibrate": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"kv_budget": 0.5, "calibrate": "empty.txt"}, "empty.txt: empty"),
        ({"kv_budget": 0.5, "calibrate": "short.txt"}, "too short: 500 tokens, expected at least 4096"),
        ({"kv_budget": 0.5, "calibrate": "noise.txt"}, "not text"),
        ({"kv_budget": 0.5, "calibrate": "text.txt", "evaluate": ["nowhere.txt"]}, "nowhere.txt: no such file"),
        ({"kv_budget": 0.5, "calibrate": "text.txt", "dtype": "float16"}, "float16 has too few exponents"),
        (
            {"kv_budget": 0.5, "calibrate": "text.txt", "target": "vllm"},
            "--rope-dim 64: expected an even number from 2 to 32",
        ),
    ],
)
def test_refused_before_any_work(
    llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    write_text(Path("short.txt"), 500)
    Path("noise.txt").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(UnsupportedInputError, match=message):
        convert(llama, "out", **options)
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


def test_a_folder_that_is_there_is_refused_before_any_work(llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(
            llama,
            tmp_path / "out",
            calibrate=text,
            advance=lambda done, total, what: pytest.fail(f"{what} has begun"),
        )


def test_healing_brings_the_result_nearer_to_its_source(llama: Path, text: Path, tmp_path: Path) -> None:
    losses = []
    for steps in (0, 30):
        out = tmp_path / str(steps)
        report = convert(llama, out, kv_budget=0.3, calibrate=text, dtype="float32", heal_steps=steps).report
        losses.append(report["losses"][0]["kl"])
    assert report["healing"]["steps"] == 30
    assert report["healing"]["kl"]["best"] < report["healing"]["kl"]["before"]
    assert abs(report["healing"]["kl"]["best"] / losses[1] - 1) < 1e-2  # what was written is what was healed
    assert losses[1] < losses[0]
    assert load(out).config.kv_lora_rank == 13


def test_healing_goes_on_where_it_was_killed(llama: Path, text: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "healing" and done > 1:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"kv_budget": 0.3, "calibrate": text, "heal": 0.06}
    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "out", advance=stop, **options)
    seconds: list[int] = []
    convert(
        llama,
        tmp_path / "out",
        advance=lambda done, total, what: seconds.append(done) if what == "healing" else None,
        **options,
    )
    assert seconds[0] > 1


def test_as_a_user_types_it(llama: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["convert", "--from-gqa", llama, "--out", tmp_path / "mla", "--calibrate", text, "--check"]
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, (done.output, done.exception)
    for expected in ("half of the cache is kept (24 + 8", "perplexity, validation part", "conversion.html"):
        assert expected in done.output
