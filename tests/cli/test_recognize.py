"""The benchmark of recognizing: it measures what it says, and the share stays below what was promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("case", ["tiny", "tiny-compiled"])
def test_shares_are_below_a_tenth(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recognize

    monkeypatch.setattr(sys, "argv", ["recognize.py", "--layers", "2", "--only", case, "--out", str(tmp_path)])
    assert recognize.main() == 0
    (row,) = json.loads((tmp_path / "recognize-cpu.json").read_text())["results"]
    assert (row["case"], row["absorbed"]) == (case, 2)
    assert 0 < row["recognize_s"] < row["compile_s"]
    assert 0 < row["validate_s"] < row["compile_s"]


def test_the_committed_result_keeps_the_promise_on_all_layers() -> None:
    rows = json.loads((BENCHMARKS / "results" / "recognize-cpu.json").read_text())["results"]
    assert {row["case"] for row in rows} == {"tiny", "v3", "tiny-compiled"}
    assert all(row["layers"] == row["absorbed"] == 61 for row in rows)
    assert all(row["share"] < 10 for row in rows)
