"""Every spelling of latent attention is absorbed, and computes what it did."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlacompile import backend, explain, last_report
from tests.spellings import Attention, Spelling

BATCH, CONTEXT = 2, 16


def compiled_and_eager(spelling: Spelling, queries: int = 1, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the compiled and of the plain module on the same input, weights and cache."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = Attention(spelling, batch, CONTEXT).eval()
    for buffer in module.buffers():
        buffer.normal_()
    tokens = queries if spelling.cache != "none" else CONTEXT
    x = torch.randn(batch, tokens, spelling.hidden)
    position = CONTEXT - tokens
    mask = make_mask(spelling, batch, tokens)
    twin = copy.deepcopy(module)
    form = "auto" if tokens <= 8 else "absorbed"
    with torch.no_grad():
        want = twin(x, position, mask)
        got = torch.compile(module, backend=backend, options={"rest": "eager", "form": form})(x, position, mask)
    for (name, a), (_, b) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(a, b), f"cache {name} differs"
    return got, want


def make_mask(spelling: Spelling, batch: int, queries: int) -> torch.Tensor | None:
    if spelling.mask in ("none", "causal"):
        return None
    allowed = torch.ones(queries, CONTEXT).tril(CONTEXT - queries).bool().expand(batch, 1, -1, -1).clone()
    allowed[0, :, :, :3] = allowed.shape[2] == CONTEXT
    return allowed if spelling.mask == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


def assert_absorbed(spelling: Spelling, queries: int = 1) -> None:
    got, want = compiled_and_eager(spelling, queries)
    report = last_report()
    assert report.absorbed == 1, f"{spelling}: {[s.reason for s in report.sites]}"
    # float32 rounding of sums of at most rank + context terms, twice, relative to the largest output
    assert (got - want).abs().max() <= 1e-5 * want.abs().max(), spelling


BASE = Spelling()
CHANGES: list[dict[str, object]] = [
    {},
    {"attention": "matmul"},
    {"attention": "einsum"},
    {"attention": "bshd"},
    {"attention": "two_terms"},
    {"projection": "separate"},
    {"projection": "slices"},
    {"projection": "blocks"},
    {"order": "rope_nope"},
    {"rope": "interleaved"},
    {"rope": "complex"},
    {"rope": "none"},
    {"cache": "apart"},
    {"cache": "fused"},
    {"mask": "additive"},
    {"mask": "none"},
    {"mask": "causal"},
    {"norm": "after"},
    {"norm": "off"},
    {"key_scale": 0.5},
    {"v_bias": True},
    {"projection": "separate", "k_bias": True},
    {"heads": 3, "rank": 20, "nope": 7, "v": 5},
    {"rank": 64, "heads": 2, "nope": 4, "v": 4},
    {"rank": 192, "rope_width": 192, "cache": "apart"},  # wider than what is probed in every element
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")
def test_one_change(change: dict[str, object]) -> None:
    assert_absorbed(replace(BASE, **change))  # type: ignore[arg-type]


SPELLINGS = st.builds(
    Spelling,
    attention=st.sampled_from(["sdpa", "matmul", "einsum", "bshd", "two_terms"]),
    projection=st.sampled_from(["joint", "separate", "slices", "blocks"]),
    order=st.sampled_from(["nope_rope", "rope_nope"]),
    rope=st.sampled_from(["half", "interleaved", "complex", "none"]),
    cache=st.sampled_from(["none", "apart", "fused"]),
    mask=st.sampled_from(["none", "bool", "additive"]),
    norm=st.sampled_from(["before", "after", "off"]),
    key_scale=st.sampled_from([1.0, 0.37]),
    v_bias=st.booleans(),
    k_bias=st.booleans(),
    heads=st.integers(2, 5),
    rank=st.integers(2, 40),
    nope=st.integers(2, 16),
    v=st.integers(2, 16),
)


@given(SPELLINGS, st.integers(1, 4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_composition(spelling: Spelling, queries: int) -> None:
    assert_absorbed(spelling, queries)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_found_on_a_device_where_nothing_can_be_computed(change: dict[str, object]) -> None:
    """Probing happens on the CPU whatever the graph is for: here on the meta device, whose tensors hold no values."""
    spelling = replace(BASE, **change)
    torch._dynamo.reset()
    module = Attention(spelling, BATCH, CONTEXT).eval()
    tokens = 1 if spelling.cache != "none" else CONTEXT
    inputs = torch.randn(BATCH, tokens, spelling.hidden), CONTEXT - tokens, make_mask(spelling, BATCH, tokens)
    form = "auto" if tokens <= 8 else "absorbed"
    report = explain(module, *inputs, options={"form": form})
    assert report.absorbed == 1, [s.reason for s in report.sites]
