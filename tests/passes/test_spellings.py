"""Every spelling of latent attention is absorbed, and computes what it did; every near miss is refused, and says why.

A few compositions run here; ``python -m tests.many_spellings`` runs thousands.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlacompile import explain
from tests.many_spellings import BATCH, CONTEXT, fault_of, make_mask
from tests.spellings import CHOICES, NEAR, Attention, Spelling, compose, compose_near_miss

BASE = Spelling()
CHANGES: list[dict[str, object]] = [
    {},
    *({name: value} for name, values in CHOICES.items() for value in values if getattr(BASE, name) != value),
    {"heads": 3, "rank": 20, "nope": 7, "v": 5},
    {"rank": 64, "heads": 2, "nope": 4, "v": 4},
]
#: Compositions that were once refused, wrong, or a crash.
FOUND: dict[str, Spelling] = {
    "a sink beside biased keys": replace(BASE, attention="matmul", projection="separate", k_bias=True, sink=True),
    "transposed weights behind views": replace(BASE, attention="keys_left", projection="slices", spread="repeat"),
    "one rotary pair, expanded first": replace(BASE, rope_width=2, turned="expanded", spread="interleave"),
    "complex rope of copies": replace(BASE, rope="complex", turned="expanded", spread="copies", cache="growing"),
    "stacked pairs, expanded first": replace(BASE, rope="interleaved", turned="expanded", cache="apart"),
    "values cut from absorbed keys": replace(BASE, projection="absorbed", cache="fused", order="rope_nope"),
    "an adapter on a scaled cache": replace(
        BASE, projection="adapter", norm="after", latent_scale=1.7, cache="indexed"
    ),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")
def test_one_change(change: dict[str, object]) -> None:
    assert fault_of(replace(BASE, **change)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FOUND)
def test_compositions_that_were_found(name: str) -> None:
    assert fault_of(FOUND[name], queries=2) is None


#: For a question that each kind of change asks in one way only: its last value. ``MLACOMPILE_FULL=1`` asks of all.
FEW = [c for i, c in enumerate(CHANGES) if not c or i + 1 == len(CHANGES) or CHANGES[i + 1].keys() != c.keys()]


@pytest.mark.parametrize("change", CHANGES if os.environ.get("MLACOMPILE_FULL") == "1" else FEW, ids=str)
def test_found_on_a_device_where_nothing_can_be_computed(change: dict[str, object]) -> None:
    """Probing happens on the CPU whatever the graph is for: here on the meta device, whose tensors hold no values."""
    spelling = replace(BASE, **change)  # type: ignore[arg-type]
    torch._dynamo.reset()
    module = Attention(spelling, BATCH, CONTEXT).eval()
    tokens = 1 if spelling.cache != "none" else CONTEXT
    x = torch.randn(BATCH, tokens, spelling.hidden, dtype=spelling.dtype)
    inputs = x, CONTEXT - tokens, make_mask(spelling, BATCH, tokens, CONTEXT)
    report = explain(module, *inputs, options={"form": "absorbed"})
    assert report.absorbed == 1, [s.reason for s in report.sites]


@given(st.data(), st.integers(1, 4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_composition(data: st.DataObject, queries: int) -> None:
    spelling = compose(lambda options: data.draw(st.sampled_from(options)))
    assert (spelling, fault_of(spelling, queries)) == (spelling, None)


@pytest.mark.parametrize("near", NEAR)
@given(data=st.data())
@settings(max_examples=1, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_near_misses(near: str, data: st.DataObject) -> None:
    def choose(options: tuple[object, ...]) -> object:
        return near if options == tuple(NEAR) else data.draw(st.sampled_from(options))

    spelling = compose_near_miss(choose)
    assert (spelling, fault_of(spelling)) == (spelling, None)
