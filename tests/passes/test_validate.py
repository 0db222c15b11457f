"""A wrong reading of a model is caught before anything runs: whatever the prober misread, validation refuses it.

Each case would change the model's output; with validation off it does, which is what makes the test mean something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mlacompile import backend, last_report
from mlacompile.passes import recognize
from mlacompile.passes.probe import Plain, Probe, WeightView
from tests.spellings import Attention, Spelling

SPELLING = Spelling(heads=3, rank=16, nope=8, rope_width=8, v=8, mask="none", v_bias=True, key_scale=0.5)
CONTEXT = 12


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
