"""The picture of a geometry, and what `explain` says of costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mlacompile import MLAGeometry, cli
from mlacompile.cost.hardware import TABLE
from mlacompile.cost.plot import draw
from mlacompile.errors import MLACompileError
from mlacompile.testing import models

GEOMETRY = MLAGeometry(heads=4, rank=64, nope=32, rope=16, v=24)


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib, which only the dev extra brings")
    file = tmp_path / "out.png"
    draw(GEOMETRY, file, batch=2, contexts=[64, 2048], dtype="bfloat16", hardware=TABLE["h200"])
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MLACompileError, match="pip install matplotlib"):
        draw(GEOMETRY, tmp_path / "out.png", batch=1, contexts=[64], dtype="bfloat16", hardware=TABLE["h200"])


def explain(folder: Path, *arguments: str) -> str:
    models.tiny_config("minicpm3", num_hidden_layers=1).save_pretrained(folder)
    done = CliRunner().invoke(cli.app, ["explain", str(folder), *arguments], env={"COLUMNS": "150"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_explain_says_what_an_attention_costs_and_where_forms_cross(tmp_path: Path) -> None:
    shown = explain(tmp_path, "--context", "64", "--hardware", "a100", "--plot", str(tmp_path / "out.png"))
    for expected in ("found at", "GFLOP", "MiB", "µs on NVIDIA A100", "expanded", "T*(-N + 2*R - V)", "49.78"):
        assert expected in shown
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_explain_takes_a_number_of_queries_and_follows_the_border(tmp_path: Path, slow_hardware: str) -> None:
    sites = {}
    for queries in (2, 60):
        torch._dynamo.reset()  # else the second number is taken for a varying one
        found = json.loads(
            explain(tmp_path, "--context", "64", "--queries", str(queries), "--hardware", slow_hardware, "--json")
        )
        (sites[queries],) = found["report"]["sites"]
        assert found["queries"] == queries
    assert (sites[2]["form"], sites[60]["form"]) == ("absorbed", "chunked")
    for site in sites.values():
        assert site["sees"] == "causal"
        assert site["seconds"] < site["instead"][0][1]
        assert site["flops"] > 0
