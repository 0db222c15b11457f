"""Orders of products: the cheapest of all, checked against trying every one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacompile.cost.chains import best_order, merges_below
from mlacompile.cost.hardware import TABLE

H200 = TABLE["h200"]
WIDTHS = st.lists(st.sampled_from([8, 16, 64, 128, 512, 1536, 7168]), min_size=2, max_size=5).map(tuple)


def seconds(cuts: tuple[int, ...], rows: int, heads: int) -> float:
    total = 0.0
    for a, b in itertools.pairwise(cuts):
        flops, moved = 2 * rows * heads * a * b, 2 * heads * (a * b + rows * (a + b))
        total += max(flops / H200.rate("matmul", "bfloat16"), moved / H200.bandwidth) + H200.latency
    return total


@given(WIDTHS, st.sampled_from([1, 64, 4096]), st.sampled_from([1, 16]))
@settings(max_examples=60, deadline=None)
def test_no_order_is_cheaper(widths: tuple[int, ...], rows: int, heads: int) -> None:
    found = best_order(widths, rows=rows, itemsize=2, dtype="bfloat16", hardware=H200, heads=heads)
    inner = range(1, len(widths) - 1)
    every = [
        tuple(widths[i] for i in (0, *kept, len(widths) - 1))
        for n in range(len(inner) + 1)
        for kept in itertools.combinations(inner, n)
    ]
    assert found.seconds == pytest.approx(min(seconds(cuts, rows, heads) for cuts in every))
    assert found.seconds == pytest.approx(seconds(found.cuts, rows, heads))
    plain = best_order(widths, rows=rows, itemsize=2, dtype="bfloat16", hardware=H200, heads=heads, allow_merge=False)
    assert plain.cuts == widths
    assert not plain.merged
    assert plain.seconds >= found.seconds


def test_w_uv_merges_with_the_output_projection_only_when_the_rank_is_small() -> None:
    """rank → v → hidden: V3 keeps its two products, a rank of 32 is multiplied straight through."""

    def after(rank: int) -> bool:
        return best_order((rank, 128, 7168), rows=4096, itemsize=2, dtype="bfloat16", hardware=H200, heads=128).merged

    assert not after(512)
    assert after(32)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_a_merged_weight_is_smaller_below_a_known_width(first: int, inner: int, last: int) -> None:
    assert (first * last < inner * (first + last)) is (first < merges_below(inner, last)) or (
        first * last == inner * (first + last)
    )


def test_the_table_of_the_documentation_is_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import merging

    assert merging.BEGIN + merging.table() + merging.END in merging.DOCS.read_text(), (
        "python benchmarks/merging.py --write"
    )
    for name, (_, rank, v, hidden) in merging.SHAPES.items():
        assert (rank < merges_below(v, hidden)) is name.startswith("SmolLM2"), name


def test_measured_tables_of_the_documentation_are_made_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import cost_tables

    text = cost_tables.DOCS.read_text()
    assert cost_tables.write(text) == text, "python benchmarks/cost_tables.py --write"


def test_a_chain_needs_two_widths() -> None:
    with pytest.raises(ValueError, match="at least two"):
        best_order((3,), rows=1, itemsize=2, dtype="bfloat16", hardware=H200)
