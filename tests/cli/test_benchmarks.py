"""The benchmark of whole decode steps, small and eager: its arithmetic, its files, its table."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import decode_plot
    import decode_step
    import readme_table

    tiny = {"num_attention_heads": 2, "hidden_size": 64, "q_lora_rank": None, "intermediate_size": 64}
    monkeypatch.setitem(decode_step.MODELS, "cpu", tiny)
    return decode_step, decode_plot, readme_table


def test_a_run_writes_results_with_their_parity_and_a_second_run_adds_to_them(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_step, decode_plot, _ = scripts
    for shape in ("3x16", "1x32"):
        command = ["decode_step.py", "--device", "cpu", "--shapes", shape, "--backends", "eager", "--calls", "2"]
        monkeypatch.setattr(sys, "argv", [*command, "--no-plot", "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as done:
            decode_step.main()
        assert not done.value.code
    file = tmp_path / "decode_step-cpu.json"
    found = json.loads(file.read_text())
    rows = found["results"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 32), (3, 16)]
    for row in rows:
        assert row["parity"] is True
        assert row["error_vs_eager"] == 0.0
        assert 0 < row["error_vs_reference"] < 1e-4
    assert found["environment"]["torch"] == torch.__version__
    decode_plot.plot(file, tmp_path / "plot.png")


def test_the_reference_agrees_with_the_model_whatever_the_chunks(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_step, _, _ = scripts
    from mlacompile.testing import models

    model = decode_step.build("cpu", torch.float64, "cpu")
    cache = models.static_cache(model, 3, 20, random=True)
    tokens = models.random_tokens(model.config, 3, 1)
    logits = decode_step.decode(model, cache, tokens, 20)
    whole = decode_step.reference_logits(model.to(torch.float32), cache, tokens, 20)
    monkeypatch.setattr(decode_step, "ROWS_AT_ONCE_TOKENS", 40)
    chunks = decode_step.reference_logits(model, cache, tokens, 20)
    torch.testing.assert_close(chunks, whole)
    assert decode_step.relative_error(whole, logits) < 1e-4


def test_a_model_in_fp8_has_a_reference_of_its_own(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_step, _, _ = scripts
    from mlacompile.testing import models

    sizes = {"num_attention_heads": 2, "hidden_size": 256, "q_lora_rank": None, "intermediate_size": 256}
    monkeypatch.setitem(decode_step.MODELS, "cpu", sizes)
    model = decode_step.build("cpu", torch.float32, "cpu")
    cache = models.static_cache(model, 1, 16, random=True)
    tokens = models.random_tokens(model.config, 1, 1)
    own, held = decode_step.in_fp8(model, cache, "block")
    logits = decode_step.decode(own, held, tokens, 16)
    keys, values = (x.clone() for x in decode_step.held_by(held.layers[0], slice(0, 1), torch.float64))
    assert keys.dtype == torch.float64
    assert torch.equal(keys.float(), held.layers[0].keys)
    assert torch.equal(values.float(), held.layers[0].values)
    exact = decode_step.reference_logits(model, held, tokens, 16, own)
    other = decode_step.reference_logits(model, cache, tokens, 16)
    assert decode_step.relative_error(logits, exact) < decode_step.relative_error(logits, other) / 3
    assert torch.equal(decode_step.held_by(held.layers[0], slice(0, 1), torch.float64)[0], keys), "it reads a copy"
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_the_table_marks_what_was_not_measured(scripts: Any, tmp_path: Path) -> None:
    _, _, readme_table = scripts
    about = {"device": "some GPU", "torch": "2", "triton": "3", "transformers": "5", "commit": "abc"}
    settings = {"layers": 2, "dtype": "bfloat16", "cache": "StaticCache"}
    times = {"default": 50.0, "reduce-overhead": 40.0, "mlacompile": 0.5}
    rows = [
        {"model": "v3", "batch": 64, "context": 8192, "backend": backend, "ms_per_layer": ms, "peak_gib": ms}
        for backend, ms in times.items()
    ]
    found = {"environment": about, "settings": settings, "results": rows}
    (tmp_path / "decode_step-nvidia-h200.json").write_text(json.dumps(found))
    text = readme_table.table(tmp_path)
    assert "| 64 × 8192 | – | 50.0 | 40.0 | 0.50 | **80.0 ×** | 0.5 GiB (40.0) |" in text
    assert "| 1 × 1024 | – | – | – | – | – | – |" in text
    assert "commit abc" in text
    page = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n"
    assert "old" not in readme_table.replace(page, text)
    with pytest.raises(ValueError, match="markers"):
        readme_table.replace("nothing", text)


def test_a_model_and_its_cache_in_fp8_say_the_same_in_half_the_memory(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_step, _, _ = scripts
    from mlacompile.testing import models

    sizes = {"num_attention_heads": 2, "hidden_size": 256, "q_lora_rank": None, "intermediate_size": 256}
    monkeypatch.setitem(decode_step.MODELS, "cpu", sizes)
    model = decode_step.build("cpu", torch.bfloat16, "cpu")
    cache = models.static_cache(model, 2, 24, random=True)
    tokens = models.random_tokens(model.config, 2, 1)
    own, held = decode_step.in_fp8(model, cache, "block")
    want, got = decode_step.decode(model, cache, tokens, 24), decode_step.decode(own, held, tokens, 24)
    assert 0 < decode_step.relative_error(got, want) < 0.2
    before, after = decode_step.sizes(model, cache), decode_step.sizes(own, held)
    assert after[1] / before[1] == pytest.approx(656 / 1152)
    assert after[0] < before[0]
    assert decode_step.in_fp8(model, cache, None)[1] is cache
