"""The benchmarks of forms, small and on the CPU: what they run is right, what they write can be read, their
arithmetic."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_both_forms_are_measured_and_the_border_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import crossover

    command = ["crossover.py", "--device", "cpu", "--shapes", "tiny", "--contexts", "64,96", "--queries", "1,8,64"]
    monkeypatch.setattr(sys, "argv", [*command, "--repeats", "2", "--out", str(tmp_path)])
    with torch.no_grad():
        crossover.main()
    found = json.loads((tmp_path / "crossover-cpu.json").read_text())
    assert len(found["results"]) == 2 * 3 * 3
    for row in found["results"]:
        assert row["us"] > 0
        assert row["predicted_us"] > 0
        assert (row["picked"] is not None) == (row["form"] == "auto")
    for at in found["borders"]:
        assert 0 < at["predicted"] < 96
        assert at["worst_auto"] > 0
    assert set(found["shares"]) == {"latent", "heads"}
    assert (tmp_path / "crossover-cpu.png").stat().st_size > 1000


def test_where_curves_cross() -> None:
    import crossover

    one = {q: float(q) for q in (1, 4, 16, 64)}
    assert crossover.crossing(one, dict.fromkeys(one, 8.0)) == pytest.approx(8.0)
    assert crossover.crossing(one, dict.fromkeys(one, 1000.0)) is None
    assert crossover.crossing(one, dict.fromkeys(one, 0.5)) is None, "slower from the start"


def test_forms_that_differ_stop_the_run() -> None:
    import crossover

    inputs = crossover.Inputs(crossover.SHAPES["tiny"], 4, 32, 1, torch.float32, "cpu")
    crossover.check(inputs, 4)
    honest = inputs.call
    inputs.call = lambda absorb, i=0: honest(absorb, i) * (1.0 if absorb else 1.01)
    with pytest.raises(SystemExit, match="the forms differ"):
        crossover.check(inputs, 4)


def test_a_prompt_is_timed_with_and_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import decode_step
    import prefill

    tiny: dict[str, Any] = {"num_attention_heads": 2, "hidden_size": 64, "q_lora_rank": None, "intermediate_size": 64}
    monkeypatch.setitem(decode_step.MODELS, "cpu", tiny)
    eager = {"stock": {"backend": "eager"}, "mlacompile": {"backend": "mlacompile", "options": {"rest": "eager"}}}
    monkeypatch.setattr(prefill, "BACKENDS", eager)
    command = ["prefill.py", "--device", "cpu", "--models", "cpu", "--tokens", "96", "--cache-length", "128"]
    monkeypatch.setattr(sys, "argv", [*command, "--calls", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as done:
        prefill.main()
    assert not done.value.code
    rows = json.loads((tmp_path / "prefill-cpu.json").read_text())["results"]
    assert [(r["cache"], r["backend"]) for r in rows] == [
        *(("static", "stock"), ("static", "mlacompile"), ("none", "stock"), ("none", "mlacompile"))
    ]
    assert all(math.isfinite(r["ms"]) and r["error_vs_eager"] < 1e-4 for r in rows)
    assert [r["form"] for r in rows if r["backend"] == "mlacompile"] == ["chunked", "expanded"]
