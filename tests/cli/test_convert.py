"""`mlacompile convert`, as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlacompile import cli
from mlacompile.checkpoint import CheckpointReader
from mlacompile.testing import models


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    models.tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_folder_becomes_a_folder(llama: Path, tmp_path: Path) -> None:
    done = run("--from-gqa", llama, "--out", tmp_path / "mla", "--check")
    assert done.exit_code == 0, (done.output, done.exception)
    for text in ("deepseek_v3 (DeepseekV3ForCausalLM)", "Only rounding", "conversion.html", "largest difference"):
        assert text in done.output
    assert "model.layers.0.self_attn.kv_b_proj.weight" in CheckpointReader(tmp_path / "mla")


def test_check_alone(llama: Path, tmp_path: Path) -> None:
    assert run(llama, "--out", tmp_path / "mla", "--max-shard-gb", "0.001").exit_code == 0
    done = run(llama, "--out", tmp_path / "mla", "--check", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["lossless"]
    models.tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    done = run(tmp_path / "other", "--out", tmp_path / "mla", "--check")
    assert done.exit_code == 1
    assert "More than rounding" in done.output


def test_json(llama: Path, tmp_path: Path) -> None:
    done = run(llama, "--out", tmp_path / "mla", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout) == json.loads((tmp_path / "mla" / "conversion.json").read_text())


def test_errors_are_one_sentence_and_keep_their_brackets(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"num_key_value_heads": 4}
    (llama / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.argv", ["mlacompile", "convert", str(llama), "--out", str(tmp_path / "mla")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "k_proj.weight' has shape [64, 128]; the configuration says [128, 128]" in said
    assert "Traceback" not in said


def test_an_interrupt_says_how_to_go_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlacompile.convert.plan import Plan

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Plan, "produce", interrupt)
    done = run(llama, "--out", tmp_path / "mla")
    assert done.exit_code == 130
    assert "The same command goes on" in done.output
    assert not (tmp_path / "mla").exists()
