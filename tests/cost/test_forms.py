"""The formulas against a count: FLOPs by PyTorch's own counter, bytes by adding up the tensors of the plain
computation."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mlacompile import MLAGeometry
from mlacompile.cost import border, forms, predict
from mlacompile.cost.border import NEVER_EXPAND, flops_border, flops_border_of, long_context_border
from mlacompile.cost.hardware import TABLE
from mlacompile.cost.predict import chunk_tokens

SIZES = st.builds(
    lambda b, s, more, h, r, n, p, v: (MLAGeometry(h, r, n, p, v), b, s, s + more),
    *(st.integers(1, 3), st.integers(1, 5), st.integers(0, 9), st.integers(1, 3)),
    *(st.integers(1, 7), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6)),
)
V3 = MLAGeometry(heads=128, rank=512, nope=128, rope=64, v=128)


def every_pair(form: str, g: MLAGeometry, b: int, s: int, t: int) -> int:
    """FLOPs of a form without causality, from the formula."""
    values = {forms.B: b, forms.S: s, forms.T: t, forms.H: g.heads, forms.R: g.rank, forms.N: g.nope, forms.P: g.rope}
    values |= {forms.V: g.v, forms.C: 64, forms.U: 132}
    return int(forms.flops(form).subs(forms.PAIRS, forms.S * forms.T).subs(values))


def absorbed(g: MLAGeometry, b: int, s: int, t: int) -> Tensor:
    q, c = torch.randn(b, g.heads, s, g.nope), torch.randn(b, t, g.rank)
    q_pe, k_pe = torch.randn(b, g.heads, s, g.rope), torch.randn(b, t, g.rope)
    q_latent = q @ torch.randn(g.heads, g.nope, g.rank)
    scores = q_latent @ c.transpose(1, 2)[:, None] + q_pe @ k_pe.transpose(1, 2)[:, None]
    return (scores.softmax(-1) @ c[:, None]) @ torch.randn(g.heads, g.rank, g.v)


def expanded(g: MLAGeometry, b: int, s: int, t: int) -> Tensor:
    q, c = torch.randn(b, g.heads, s, g.nope + g.rope), torch.randn(b, t, g.rank)
    kv = (c @ torch.randn(g.rank, g.heads * (g.nope + g.v))).view(b, t, g.heads, -1).transpose(1, 2)
    k = torch.cat((kv[..., : g.nope], torch.randn(b, g.heads, t, g.rope)), -1)
    return (q @ k.transpose(2, 3)).softmax(-1) @ kv[..., g.nope :]


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_flops_are_what_pytorch_counts(sizes: tuple[MLAGeometry, int, int, int]) -> None:
    for form, compute in (("absorbed", absorbed), ("expanded", expanded), ("chunked", expanded)):
        with FlopCounterMode(display=False) as counter:
            compute(*sizes)
        assert counter.get_total_flops() == every_pair(form, *sizes), form


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_causality_halves_a_square_and_leaves_one_query_alone(sizes: tuple[MLAGeometry, int, int, int]) -> None:
    _, _, s, t = sizes
    seen = sum(q + 1 <= t and t - s + q + 1 for q in range(s))
    assert forms.PAIRS.subs({forms.S: s, forms.T: t}) == seen


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_bytes_are_inputs_read_and_outputs_written_once(sizes: tuple[MLAGeometry, int, int, int]) -> None:
    g, b, s, t = sizes
    n, rows = 2, b * s * g.heads
    weights = g.heads * g.rank * (g.nope + g.v)
    up_q = rows * (g.nope + g.rank)
    attend = b * t * g.latent_width + rows * (2 * g.rank + g.rope)
    down = rows * (g.rank + g.v)
    want = n * (weights + up_q + attend + down)
    found = predict("absorbed", g, batch=b, queries=s, context=t, dtype="bfloat16", hardware=TABLE["h200"])
    assert found.bytes == want
    kv, keys, values = (b * t * g.heads * width for width in (g.nope + g.v, g.nope + g.rope, g.v))
    want = b * t * g.rank + weights + kv  # expand
    want += b * t * g.heads * g.nope + b * t * g.rope + keys  # assemble
    want += keys + values + rows * (g.nope + g.rope + g.v)  # attend
    found = predict("expanded", g, batch=b, queries=s, context=t, dtype="bfloat16", hardware=TABLE["h200"])
    assert found.bytes == n * want


def test_a_chunked_form_in_one_chunk_merges_nothing() -> None:
    sizes = {"batch": 1, "queries": 1024, "context": 1024, "dtype": "bfloat16", "hardware": TABLE["h200"]}
    one, four = (predict("chunked", V3, chunk=c, **sizes) for c in (1024, 256))  # type: ignore[arg-type]
    whole = predict("expanded", V3, **sizes)  # type: ignore[arg-type]
    assert one.flops == whole.flops
    assert one.bytes < whole.bytes, "keys are written in place"
    assert one.seconds < four.seconds


def test_each_block_of_queries_expands_what_is_before_it_again() -> None:
    sizes = {"batch": 1, "context": 1024, "dtype": "bfloat16", "hardware": TABLE["h200"]}
    one, four = (predict("chunked", V3, queries=1024, chunk=c, **sizes) for c in (1024, 256))  # type: ignore[arg-type]
    again = 256 * (1 + 2 + 3)  # tokens
    assert four.flops - one.flops == 2 * again * V3.heads * V3.rank * (V3.nope + V3.v)
    few = predict("chunked", V3, queries=64, chunk=256, **sizes)  # type: ignore[arg-type]
    assert few.flops == predict("expanded", V3, queries=64, **sizes).flops  # type: ignore[arg-type]


def test_the_crossover_is_solved_and_is_the_known_number() -> None:
    t, r, n, v = forms.T, forms.R, forms.N, forms.V
    assert sympy.simplify(flops_border() - t * r * (n + v) / (t * (2 * r - n - v) + r * (n + v))) == 0
    assert sympy.simplify(long_context_border() - r * (n + v) / (2 * r - n - v)) == 0
    assert flops_border_of(V3) == pytest.approx(512 * 256 / 768)
    assert flops_border_of(V3, 1024) < flops_border_of(V3)
    assert flops_border_of(MLAGeometry(4, 16, 32, 8, 32)) == float("inf"), "a small rank is always absorbed"


@given(
    st.builds(MLAGeometry, st.sampled_from([1, 16, 128]), st.sampled_from([32, 256, 512]), st.just(128), st.just(64),
              st.just(128)),
    st.sampled_from([1, 8, 64]), st.integers(2, 40000), st.sampled_from(["bfloat16", "float32"]),
    st.sampled_from(sorted(TABLE)), st.sampled_from(["expanded", "chunked"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_border_divides_what_is_cheaper(
    g: MLAGeometry, batch: int, context: int, dtype: str, device: str, form: str
) -> None:
    found = border(g, batch, context, dtype, TABLE[device], form)
    for queries, absorb in ((found, True), (found + 1, False)):
        if 1 <= queries <= context:
            one, other = (
                predict(f, g, batch=batch, queries=queries, context=context, dtype=dtype, hardware=TABLE[device])
                for f in ("absorbed", form)
            )
            assert (one.seconds <= other.seconds) is absorb
    assert found == NEVER_EXPAND or 0 <= found < context


def test_chunks_are_powers_of_two_below_a_gibibyte() -> None:
    for heads in (1, 7, 16, 128, 4000):
        g = MLAGeometry(heads, 512, 128, 64, 128)
        chunk = chunk_tokens(g, 2)
        assert chunk & (chunk - 1) == 0
        assert chunk == 256 or chunk * g.expanded_width * 2 <= 1 << 30
        assert chunk <= 8192
