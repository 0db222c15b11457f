"""A wrong reading of a model is caught before anything runs: whatever the prober misread, validation refuses it.

Each case would change the model's output; with validation off it does, which is what makes the test mean something.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlacompile import backend, last_report
from mlacompile.options import Options
from mlacompile.passes import pipeline, recognize
from mlacompile.passes.maps import Plain, Probe, WeightView
from mlacompile.passes.recognize import MLASite
from mlacompile.passes.validate import Rewrite, Verdict, validate
from tests.many_spellings import make_mask
from tests.spellings import Attention, Spelling

SPELLING = Spelling(heads=3, rank=16, nope=8, rope_width=8, v=8, mask="none", v_bias=True, key_scale=0.5)
CONTEXT = 12
FULL = os.environ.get("MLACOMPILE_FULL") == "1"


def scaled(view: WeightView, factor: float) -> WeightView:
    return replace(view, scale=view.scale * factor)


def shifted(view: WeightView) -> WeightView:
    """The rows behind the right ones: of the next half of the same weight."""
    at = view.view.order[1]
    ranges = list(view.view.ranges)
    start, length = ranges[at]
    ranges[at] = (start + 1 if start + length < view.view.shape[at] else start - 1, length)
    return replace(view, view=replace(view.view, ranges=tuple(ranges)))


TAMPER: dict[str, Callable[[Probe], Probe]] = {
    "scale-of-w_uk": lambda p: replace(p, w_uk=scaled(p.w_uk, 1.001)),
    "sign-of-w_uk": lambda p: replace(p, w_uk=scaled(p.w_uk, -1.0)),
    "scale-of-w_uv": lambda p: replace(p, w_uv=scaled(p.w_uv, 0.999)),
    "rows-of-w_uk": lambda p: replace(p, w_uk=shifted(p.w_uk)),
    "rows-of-w_uv": lambda p: replace(p, w_uv=shifted(p.w_uv)),
    "swapped-weights": lambda p: replace(p, w_uk=p.w_uv, w_uv=p.w_uk),
    "scale-of-the-rotary-key": lambda p: replace(p, w_pe=Plain(2.0 * p.w_pe.scale)),
    "rows-of-the-rotary-key": lambda p: replace(p, pe_rows=p.k_rows, k_rows=p.pe_rows),
    "no-rotary-key": lambda p: replace(p, w_pe=Plain(0.0)),
    "no-bias": lambda p: replace(p, v_bias=None),
    "scale-of-the-bias": lambda p: replace(p, v_bias=scaled(p.v_bias, 1.5)),  # type: ignore[arg-type]
}


def run(tamper: Callable[[Probe], Probe], verify: str, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    probe = recognize.probe
    monkeypatch.setattr(recognize, "probe", lambda *args: tamper(probe(*args)))
    torch.manual_seed(0)
    module = Attention(SPELLING).eval()
    x = torch.randn(2, CONTEXT, SPELLING.hidden)
    compiled = torch.compile(module, backend=backend, options={"rest": "eager", "form": "absorbed", "verify": verify})
    with torch.no_grad():
        return compiled(x), module(x)


@pytest.mark.parametrize("name", TAMPER)
def test_validation_refuses_what_the_prober_misread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got, want = run(TAMPER[name], "compile", monkeypatch)
    (site,) = last_report().sites
    assert site.status == "refused"
    assert "bug in mlacompile" in site.reason
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", TAMPER)
def test_without_validation_the_output_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got, want = run(TAMPER[name], "off", monkeypatch)
    assert last_report().absorbed == 1
    assert (got - want).abs().max() > 1e-6 * want.abs().max()


def test_what_the_prober_read_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    got, want = run(lambda p: p, "compile", monkeypatch)
    assert last_report().absorbed == 1
    torch.testing.assert_close(got, want)


#: Each form and each misreading; the smallest of them, a thousandth, with both forms. ``MLACOMPILE_FULL=1``: all.
REPRODUCED = [
    ("scale-of-w_uk", "absorbed"),
    ("scale-of-w_uk", "expanded"),
    ("swapped-weights", "absorbed"),
    ("scale-of-the-bias", "expanded"),
    *([("swapped-weights", "expanded"), ("scale-of-the-bias", "absorbed")] if FULL else []),
]


@pytest.mark.parametrize(("name", "form"), REPRODUCED)
def test_a_refused_rewrite_leaves_a_reproducer_that_fails_on_its_own(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It runs where mlacompile is not installed, and shows the same difference and tolerance as the report."""
    reproducer, reason = _reproducer(TAMPER[name], form, monkeypatch, tmp_path)
    done = subprocess.run([sys.executable, "-I", reproducer], capture_output=True, text=True, check=False)
    assert (done.returncode, "mlacompile" in reproducer.read_text().split("Run it", 1)[1]) == (1, False), done.stderr
    match = re.search(r"largest difference (\S+), rounding explains (\S+): they differ", done.stdout)
    said = re.search(r"differs from the original by (\S+) \(rounding explains (\S+)\)", reason)
    assert match is not None
    assert said is not None
    # Both are printed with three digits.
    assert [float(x) for x in match.groups()] == pytest.approx([float(x) for x in said.groups()], rel=1e-2)


def _reproducer(
    tamper: Callable[[Probe], Probe], form: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> tuple[Path, str]:
    probe = recognize.probe
    monkeypatch.setattr(recognize, "probe", lambda *args: tamper(probe(*args)))
    spelling = replace(SPELLING, mask="computed", cache="apart")
    module = Attention(spelling, 2, CONTEXT).eval()
    inputs = torch.randn(2, 4, spelling.hidden), CONTEXT - 4, make_mask(spelling, 2, 4, CONTEXT)
    options = {"rest": "eager", "form": form, "dump": folder}
    with torch.no_grad():
        torch.compile(module, backend=backend, options=options)(*inputs)
    (site,) = last_report().sites
    (file,) = folder.glob("graph*/refused-*/reproduce.py")
    assert str(file) in site.reason
    assert str(site.seed) in file.read_text()
    return file, site.reason


def test_every_compilation_draws_other_data_and_a_seed_repeats_it() -> None:
    def seeds(**options: object) -> int | None:
        torch._dynamo.reset()
        module = Attention(SPELLING).eval()
        with torch.no_grad():
            torch.compile(module, backend=backend, options={"rest": "eager", "form": "absorbed", **options})(
                torch.randn(2, CONTEXT, SPELLING.hidden)
            )
        return last_report().sites[0].seed

    assert seeds() != seeds()
    assert seeds(seed=7) == 7
    assert seeds(verify="off") is None


@pytest.mark.parametrize("projection", ["joint", "layers", "adapter", "dequantized", "absorbed"])
def test_rounding_stays_well_within_what_is_allowed(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds for any data; on random data rounding must stay far below it, or fresh seeds would fail."""
    verdicts: list[Verdict] = []

    def many(site: MLASite, options: Options, seed: int, rewrite: Rewrite) -> Verdict:
        verdicts.extend(validate(site, options, s, rewrite) for s in range(seed, seed + 20))
        return verdicts[-1]

    monkeypatch.setattr(pipeline, "validate", many)
    spelling = replace(SPELLING, projection=projection, v_bias=projection in ("joint", "layers"))
    with torch.no_grad():
        torch.compile(Attention(spelling).eval(), backend=backend, options={"rest": "eager", "form": "absorbed"})(
            torch.randn(2, CONTEXT, spelling.hidden)
        )
    assert len(verdicts) == 20
    assert 0 < max(v.error / v.bound for v in verdicts) < 0.25
