"""The commands, as a user types them: what they print, and what they exit with."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlacompile import cli
from mlacompile.cli.demo import RUNNERS, Step, _plot, _table
from mlacompile.cli.doctor import examine
from mlacompile.testing import models


@pytest.fixture
def write_config(tmp_path: Path) -> Any:
    """A folder that holds the configuration of a tiny model."""

    def write(family: str, **overrides: Any) -> str:
        models.tiny_config(family, **overrides).save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_explain_finds_every_latent_attention_of_a_configuration(write_config: Any, attn: str) -> None:
    done = run("explain", write_config("deepseek_v3"), "--context", "64", "--attn", attn, "--strict", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert (found["layers"], found["layers_built"]) == (3, 2)
    assert [site["status"] for site in found["report"]["sites"]] == ["absorbed"] * 2
    assert found["report"]["sites"][0]["geometry"] == {"heads": 4, "rank": 64, "nope": 32, "rope": 16, "v": 24}


def test_explain_prints_a_table_and_says_how_many_layers_it_built(write_config: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    folder = write_config("minicpm3", num_hidden_layers=62)
    done = run("explain", f"{folder}/config.json", "--context", "32", "--html", str(page))
    assert done.exit_code == 0, (done.output, done.exception)
    assert "first 2 of 62 layers" in done.stdout
    assert "2 absorbed" in done.stdout
    assert "absorbed" in page.read_text()


def test_explain_keeps_a_prefill_expanded(write_config: Any, slow_hardware: str) -> None:
    prefill = ("--phase", "prefill", "--context", "64", "--layers", "1", "--hardware", slow_hardware)
    done = run("explain", write_config("deepseek_v3"), *prefill, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert [site["status"] for site in json.loads(done.stdout)["report"]["sites"]] == ["expanded"]


def test_explain_says_no_to_a_model_without_a_latent(write_config: Any) -> None:
    done = run("explain", write_config("llama"), "--context", "32")
    assert done.exit_code == 1
    assert "No latent attention" in done.stdout


@pytest.mark.parametrize(
    ("text", "expected"), [(None, "found none"), ("{", "cannot read"), ('{"model_type": "nobody"}', "nobody")]
)
def test_bad_configurations_are_an_error_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["mlacompile", "explain", str(tmp_path)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["--phase", "training"], ["--batch", "0"], ["--dtype", "int8"], ["--nobody"]])
def test_bad_options_are_usage_errors(write_config: Any, arguments: list[str]) -> None:
    assert run("explain", write_config("llama"), *arguments).exit_code == 2


def test_doctor_says_what_is_usable_and_why_not() -> None:
    found = examine()
    assert found["versions"]["torch"]
    kernels = {row["kernel"]: row for row in found["kernels"]}
    assert kernels["reference"]["usable"]
    assert all(row["usable"] or row["reasons"] for row in found["kernels"])
    shown = run("doctor")
    assert "reference" in shown.stdout
    assert json.loads(run("doctor", "--json").stdout)["versions"] == found["versions"]


def test_demo_draws_its_table_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib, which only the dev extra brings")
    times = {runner: 1.0 + i for i, runner in enumerate(RUNNERS)}
    steps = [Step(512, times, 1e-7), Step(1024, times, 2e-7)]
    assert _table(steps).row_count == 2
    assert _plot(steps, tmp_path / "plot.png", "cpu")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_demo_refuses_contexts_that_are_not_lengths() -> None:
    for text in ("many", "1"):
        done = run("demo", "--contexts", text)
        assert "--contexts" in str(done.exception)
