"""The op's body against float64 brute force, its guarantees, its errors, and what tracers make of it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.errors import UnsupportedInputError
from mlacompile.ops import mla_decode, mla_decode_reference
from mlacompile.testing.latents import LatentCase, LatentInputs, exact, make_inputs, paged, quantized, worst

cases = st.builds(
    LatentCase,
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 3, 4]),
    queries=st.integers(1, 4),
    tokens=st.integers(1, 40),
    rank=st.sampled_from([1, 5, 24, 40]),
    rope=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    fused=st.booleans(),
    mask=st.sampled_from([None, "bool", "additive", "shared"]),
    start=st.booleans(),
    length=st.booleans(),
    causal=st.booleans(),
    poison=st.booleans(),
)


def check(inputs: LatentInputs, *, unit: float, operand_unit: float = 0.0, **keywords: Any) -> None:
    out, lse = mla_decode(*inputs.tensors, **inputs.keywords, **keywords)
    want = exact(inputs, unit=unit, operand_unit=operand_unit)
    assert out.dtype == inputs.tensors[0].dtype  # type: ignore[union-attr]
    assert lse.dtype == torch.float32
    assert not worst(out, want.out, want.out_bound), f"out: {worst(out, want.out, want.out_bound)}"
    lse_bound = want.lse_bound + 2**-24 * want.lse.abs().nan_to_num(posinf=0.0)  # lse is stored in float32
    assert not worst(lse, want.lse, lse_bound), f"lse: {worst(lse, want.lse, lse_bound)}"


@settings(max_examples=150, deadline=None)
@given(case=cases, seed=st.integers(0, 9))
def test_matches_brute_force(case: LatentCase, seed: int) -> None:
    check(make_inputs(case, seed=seed), unit=2**-52 if case.dtype == torch.float64 else 2**-23)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, unit: float) -> None:
    check(
        make_inputs(LatentCase(dtype=dtype, queries=2, length=True, poison=True)),
        unit=2**-23,
        operand_unit=unit,
    )


@settings(max_examples=60, deadline=None)
@given(case=cases, page=st.sampled_from([16, 32, 64]), seed=st.integers(0, 9))
def test_pages_change_nothing(case: LatentCase, page: int, seed: int) -> None:
    """Pages in any order, NaN in the others and behind the last token, wild numbers where nobody looks."""
    inputs = make_inputs(dataclasses.replace(case, mask=None), seed=seed)
    on_pages = paged(inputs, page, seed=seed)
    for got, want in zip(
        mla_decode(*on_pages.tensors, **on_pages.keywords), mla_decode(*inputs.tensors, **inputs.keywords), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    case=cases,
    per=st.sampled_from(["token", "block"]),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    rope=st.booleans(),
    page=st.sampled_from([0, 16]),
    rank=st.sampled_from([24, 200]),
)
def test_an_fp8_cache_means_its_values_times_their_factors(
    case: LatentCase, per: str, dtype: torch.dtype, rope: bool, page: int, rank: int
) -> None:
    case = dataclasses.replace(case, rank=rank, mask=None if page else case.mask, dtype=torch.float32)
    stored, said = quantized(make_inputs(case), per=per, dtype=dtype, rope=rope)
    stored = paged(stored, page) if page else stored
    for got, want in zip(
        mla_decode(*stored.tensors, **stored.keywords), mla_decode(*said.tensors, **said.keywords), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_page_number_outside_the_cache_means_the_nearest_page() -> None:
    inputs = paged(make_inputs(LatentCase(batch=2, tokens=64)), 16, shuffled=False)
    names = ("q_latent", "q_pe", "c_kv", "k_pe", "mask", "start", "length", "block_table", "descale")
    arguments = dict(zip(names, inputs.tensors, strict=True))
    wild, tame = arguments["block_table"].clone(), arguments["block_table"].clone()  # type: ignore[union-attr]
    wild[0, 1], wild[1, 2] = -(2**31), 2**31 - 1
    tame[0, 1], tame[1, 2] = 0, arguments["c_kv"].shape[0] - 1  # type: ignore[union-attr]
    got = mla_decode(**{**arguments, "block_table": wild}, **inputs.keywords)[0]
    want = mla_decode(**{**arguments, "block_table": tame}, **inputs.keywords)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert not got[0].isnan().any()


def test_length_beyond_the_table_ends_with_the_table() -> None:
    inputs = paged(make_inputs(LatentCase(batch=2, tokens=64)), 16)
    beyond = torch.tensor([2**31 - 1, 65], dtype=torch.int32)
    got = mla_decode(*inputs.tensors[:6], beyond, inputs.tensors[7], **inputs.keywords)[0]
    torch.testing.assert_close(got, mla_decode(*inputs.tensors, **inputs.keywords)[0])


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("tokens", [0, 7])
def test_an_empty_batch_or_cache_gives_an_empty_or_zero_result(batch: int, tokens: int) -> None:
    q, cache = torch.randn(batch, 3, 1, 16), torch.randn(batch, tokens, 16)
    out, lse = mla_decode(q, None, cache, None, None, None, None, scale=1.0)
    assert out.shape == q.shape
    assert tokens > 0 or (torch.equal(out, torch.zeros_like(out)) and bool((lse == -math.inf).all()))


def test_query_that_sees_nothing_gets_zero_and_minus_infinity() -> None:
    inputs = make_inputs(LatentCase(batch=2, queries=3, causal=True))
    length = torch.tensor([2, 0], dtype=torch.int32)  # of three causal queries over two tokens, the first sees none
    out, lse = mla_decode(*inputs.tensors[:6], length, **inputs.keywords)
    assert torch.equal(out[0, :, 0], torch.zeros_like(out[0, :, 0]))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert (lse[0, :, 0] == -math.inf).all()
    assert (lse[1] == -math.inf).all()
    assert torch.isfinite(lse[0, :, 1:]).all()


def test_live_nan_reaches_the_result() -> None:
    inputs = make_inputs(LatentCase(batch=2, poison=False))
    inputs.tensors[2][0, 5] = math.nan  # type: ignore[index]
    out, _ = mla_decode(*inputs.tensors, **inputs.keywords)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_cache_with_a_strided_last_dimension_is_copied() -> None:
    inputs = make_inputs(LatentCase())
    q, qp, c, kp, *rest = inputs.tensors
    swapped = c.transpose(1, 2).contiguous().transpose(1, 2)  # type: ignore[union-attr]
    got = mla_decode(q, qp, swapped, kp, *rest, **inputs.keywords)[0]
    torch.testing.assert_close(got, mla_decode(*inputs.tensors, **inputs.keywords)[0], rtol=0, atol=0)


def bad(**changes: Any) -> None:
    """Call the op on good inputs with some of them replaced."""
    names = ("q_latent", "q_pe", "c_kv", "k_pe", "mask", "start", "length", "block_table", "descale")
    inputs = make_inputs(LatentCase(batch=2, heads=3, queries=2, tokens=7, rank=16, rope=4))
    arguments = dict(zip(names, (*inputs.tensors, None, None), strict=True)) | inputs.keywords | changes
    tensors = [arguments.pop(name) for name in names]
    mla_decode(*tensors, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_latent": torch.zeros(2, 3, 16)}, r"view a \[B, 1, T, R\] cache"),
        ({"c_kv": torch.zeros(2, 7, 12)}, r"c_kv of shape \[2, 7, 12\]; expected \[2, 7, 16\]"),
        ({"k_pe": None}, "both or neither"),
        ({"k_pe": torch.zeros(2, 6, 4)}, r"k_pe of shape \[2, 6, 4\]; expected \[2, 7, 4\]"),
        ({"q_pe": torch.zeros(2, 3, 1, 4)}, r"q_pe of shape"),
        ({"c_kv": torch.zeros(2, 7, 16, dtype=torch.bfloat16)}, "one dtype for all four"),
        ({"q_latent": torch.zeros(2, 3, 2, 16, dtype=torch.int64)}, "Dequantize"),
        ({"mask": torch.ones(2, 1, 2, 7, dtype=torch.bool)}, r"mask\[:, 0\]"),
        ({"mask": torch.ones(2, 2, 7, dtype=torch.int64)}, "mask != 0"),
        ({"length": torch.tensor([1, 2])}, "length.to"),
        ({"start": torch.tensor([1], dtype=torch.int32)}, "one value a batch row"),
        ({"mask": torch.ones(2, 2, 7, dtype=torch.bool, device="meta")}, "expected one device"),
        ({"block_table": torch.zeros(2, dtype=torch.int32)}, r"block_table of shape \[2\]; expected \[B, N\]"),
        ({"block_table": torch.zeros(2, 1)}, r"block_table.to\(torch.int32\)"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "pages of 7 tokens; expected a power of two from 16"),
        (
            {"block_table": torch.zeros(2, 1, dtype=torch.int32), "c_kv": torch.zeros(3, 16, 16)},
            r"k_pe of shape \[2, 7, 4\]; expected \[3, 16, 4\]",
        ),
        ({"c_kv": torch.zeros(2, 7, 16, dtype=torch.float8_e4m3fn)}, "c_kv of torch.float8_e4m3fn without descale"),
        ({"descale": torch.ones(2, 7, 1)}, "descale with c_kv of torch.float32; expected an FP8 cache"),
        (
            {"c_kv": torch.zeros(2, 7, 16, dtype=torch.float8_e5m2), "descale": torch.ones(2, 7, 3)},
            r"descale of torch.float32 \[2, 7, 3\]; expected float32 \[2, 7, G\] with G = 1 or 1",
        ),
        ({"impl": "fastest"}, "expected one of auto, reference, gluon, triton"),
        ({"impl": "triton"}, "cannot take these inputs: .*CUDA"),
    ],
)
def test_bad_input_says_what_to_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        bad(**changes)


@pytest.mark.parametrize(
    "case",
    [
        LatentCase(),
        LatentCase(rope=0, queries=2, causal=True, length=True, start=True),
        LatentCase(mask="additive", fused=True),
    ],
    ids=str,
)
def test_opcheck(case: LatentCase) -> None:
    inputs = make_inputs(case)
    torch.library.opcheck(mla_decode, inputs.tensors, {**inputs.keywords, "impl": "reference"})


def test_opcheck_on_pages() -> None:
    inputs = paged(make_inputs(LatentCase(length=True)), 16)
    torch.library.opcheck(mla_decode, inputs.tensors, {**inputs.keywords, "impl": "reference"})


def test_fake_keeps_symbolic_shapes() -> None:
    inputs = make_inputs(LatentCase(batch=2, heads=3, queries=2, tokens=9, length=True))
    traced = make_fx(lambda *tensors: mla_decode(*tensors, **inputs.keywords), tracing_mode="symbolic")(*inputs.tensors)
    node = next(n for n in traced.graph.nodes if n.target is torch.ops.mlacompile.mla_decode.default)
    out, lse = node.meta["val"]
    q_latent = next(n for n in traced.graph.nodes if n.op == "placeholder").meta["val"]
    assert all(isinstance(size, torch.SymInt) for size in (out.shape[0], out.shape[1], out.shape[3]))
    assert out.shape == q_latent.shape
    assert lse.shape == q_latent.shape[:3]


@pytest.mark.parametrize(
    "case",
    [
        LatentCase(),
        LatentCase(queries=3, causal=True, length=True, start=True, poison=True),
        LatentCase(mask="bool", poison=True),
    ],
    ids=str,
)
def test_body_is_traceable(case: LatentCase) -> None:
    inputs = make_inputs(case)
    traced = make_fx(lambda *t: mla_decode_reference(*t, **inputs.keywords), tracing_mode="symbolic")(*inputs.tensors)
    want = mla_decode_reference(*inputs.tensors, **inputs.keywords)  # type: ignore[arg-type]
    for got, expected in zip(traced(*inputs.tensors), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    products = [n for n in traced.graph.nodes if n.target is torch.ops.aten.bmm.default]
    assert len(products) == 3, "two products for the scores, one for the output"
    clones = [n for n in traced.graph.nodes if n.target is torch.ops.aten.clone.default]
    assert not any(case.tokens in n.meta["val"].shape for n in clones), "the cache must not be copied"


def test_import_pulls_in_no_triton() -> None:
    # torch itself may import triton; what is asked is that this package adds nothing to that.
    probe = "import sys, torch; before = {*sys.modules}; import mlacompile.ops; print({*sys.modules} - before)"
    added = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout
    assert "'triton'" not in added
