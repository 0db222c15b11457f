"""The CPU kernel against float64: bounds, holes, poison, stretches that overlap, dtypes; and when it may be chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacompile.kernels import registry
from mlacompile.kernels.mla_decode import cpu
from mlacompile.kernels.mla_decode.cpu import mla_decode_cpu
from mlacompile.ops import mla_decode
from mlacompile.testing.latents import LatentCase, LatentInputs, exact, make_inputs, quantized, worst

#: Relative error of an accumulation step (the float32 exponential is good to 20 ULP, hence not 2^-23), unit roundoff of
#: P and of what is stored (0: no less than a step's), relative error of an exponential where P has 16 bits.
UNITS = {
    torch.float64: (2**-52, 0.0, 0.0),
    torch.float32: (2**-22, 0.0, 0.0),
    torch.bfloat16: (2**-22, 2**-8, 2**-13),
    torch.float16: (2**-22, 2**-11, 2**-13),
}

cases = st.builds(
    LatentCase,
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 3, 5, 16]),
    queries=st.integers(1, 8),
    tokens=st.integers(1, 60),
    rank=st.sampled_from([1, 5, 16, 24, 40, 64]),
    rope=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from(list(UNITS)),
    fused=st.booleans(),
    mask=st.sampled_from([None, None, "bool", "additive", "shared"]),
    start=st.booleans(),
    length=st.booleans(),
    causal=st.booleans(),
    poison=st.booleans(),
)


def check(inputs: LatentInputs, stretches: int | None = None, *, stored: LatentInputs | None = None) -> None:
    """stored: the call that is made, whose FP8 cache says what that of ``inputs`` holds."""
    dtype = inputs.tensors[0].dtype  # type: ignore[union-attr]
    unit, operand_unit, exponential = UNITS[dtype]
    call = inputs if stored is None else stored
    out, lse = mla_decode_cpu(*call.tensors, **call.keywords, stretches=stretches)  # type: ignore[arg-type]
    want = exact(
        inputs,
        unit=unit,
        operand_unit=operand_unit + 2 * exponential,
        # Values times factors: rounded to the dtype of the queries here, to float32 in what ``inputs`` holds.
        key_unit=0.0 if stored is None else max(operand_unit, 2**-24),
    )
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert not worst(out, want.out, want.out_bound), f"out: {worst(out, want.out, want.out_bound)}"
    stored = 2**-24 * want.lse.abs().nan_to_num(posinf=0.0)  # in float32
    lse_bound = want.lse_bound + exponential + stored
    assert not worst(lse, want.lse, lse_bound), f"lse: {worst(lse, want.lse, lse_bound)}"


@settings(max_examples=300, deadline=None)
@given(case=cases, seed=st.integers(0, 9), stretches=st.sampled_from([None, 2, 3, 7]))
def test_matches_brute_force(case: LatentCase, seed: int, stretches: int | None) -> None:
    check(make_inputs(case, seed=seed), stretches)


@settings(max_examples=100, deadline=None)
@given(
    case=cases,
    seed=st.integers(0, 9),
    fp8=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    per=st.sampled_from(["token", "block"]),
    rope=st.booleans(),
    chunk=st.sampled_from([8, 17, 1000]),
)
def test_fp8_caches_in_chunks_match_brute_force(
    case: LatentCase, seed: int, fp8: torch.dtype, per: str, rope: bool, chunk: int
) -> None:
    case = replace(case, rank=case.rank if per == "token" else 8 * case.rank)
    stored, said = quantized(make_inputs(case, seed=seed), per=per, dtype=fp8, rope=rope)
    with mock.patch.multiple(cpu, _CHUNK=chunk * case.batch * case.rank, _STRETCH=1):
        check(said, stored=stored)


@pytest.mark.parametrize("dtype", cpu._SHIFTED, ids=str)
@pytest.mark.parametrize("flush", [False, True])
def test_every_fp8_value_is_widened_exactly(dtype: torch.dtype, flush: bool) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    want = every.to(torch.float32)

    def widened(x: torch.Tensor) -> torch.Tensor:
        return cpu._in_float32(x, torch.empty(x.shape, dtype=torch.int32))

    torch.set_flush_denormal(flush)
    try:
        finite = every[want.isfinite()]
        assert torch.equal(widened(finite), want[want.isfinite()])
        assert torch.equal(widened(every).isnan(), want.isnan())
        assert torch.equal(widened(every).nan_to_num(0.0), want.nan_to_num(0.0))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(("threads", "chunk"), [(1, 512), (2, 1024)])
def test_of_an_fp8_cache_only_chunks_are_widened(threads: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is as small as pays, 512 tokens, unless more threads want a stretch of 512 each."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    stored, said = quantized(make_inputs(LatentCase(1, 4, 1, 5000, 512, 64, torch.bfloat16, length=True)))
    said.tensors[6][0] = stored.tensors[6][0] = 3000  # type: ignore[index]
    widened: list[tuple[int, ...]] = []
    widen = cpu._widened
    monkeypatch.setattr(cpu, "_widened", lambda c_kv, *rest: widened.append(c_kv.shape) or widen(c_kv, *rest))
    check(said, stored=stored)
    assert sum(shape[1] for shape in widened) == 3000, "tokens that nobody sees were looked at"
    assert max(shape[1] for shape in widened) == chunk


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("queries", [1, 4])
def test_real_widths_and_stretches_of_its_own_choice(dtype: torch.dtype, queries: int) -> None:
    case = LatentCase(1, 16, queries, 1501, 512, 64, dtype, fused=True, causal=True, start=True, poison=True)
    check(make_inputs(case))


def test_rows_of_very_different_length() -> None:
    inputs = make_inputs(LatentCase(batch=3, queries=2, tokens=90, poison=False))
    tensors = (*inputs.tensors[:6], torch.tensor([3, 0, 90], dtype=torch.int32))
    inputs = LatentInputs(tensors, inputs.keywords)
    for row, length in ((0, 3), (1, 0)):
        tensors[2][row, length:] = math.nan  # type: ignore[index]
    check(inputs)


def spoiled_hole(value: float) -> LatentInputs:
    """A token in the middle of the window that no query sees, its latent and rotary key full of ``value``."""
    inputs = make_inputs(LatentCase(batch=2, tokens=30))
    mask = torch.ones(1, 1, 30, dtype=torch.bool)
    mask[..., 11] = False
    _, _, c_kv, k_pe, *_ = inputs.tensors
    for cache in (c_kv, k_pe):
        cache[:, 11] = value  # type: ignore[index]
    return LatentInputs((*inputs.tensors[:4], mask, None, None), inputs.keywords)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e20, 0.0])
def test_a_hole_never_reaches_the_result(value: float) -> None:
    check(spoiled_hole(value))
    check(spoiled_hole(value), stretches=4)


@pytest.mark.parametrize(("value", "copied"), [(1.0, False), (math.nan, True), (3e38, True)])
def test_only_a_harmful_hole_costs_a_copy(value: float, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = spoiled_hole(value)
    seen = []

    def spy(call: cpu._Call, stretches: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(call.c_kv)
        return attend(call, stretches)

    attend = cpu._attend
    monkeypatch.setattr(cpu, "_attend", spy)
    check(inputs)
    cache = inputs.tensors[2]
    assert cache is not None
    assert (seen[0].untyped_storage().data_ptr() != cache.untyped_storage().data_ptr()) is copied


def test_query_that_sees_nothing_gets_zero_and_minus_infinity() -> None:
    inputs = make_inputs(LatentCase(batch=2, queries=3, causal=True))
    length = torch.tensor([2, 0], dtype=torch.int32)  # of three causal queries over two tokens, the first sees none
    out, lse = mla_decode_cpu(*inputs.tensors[:6], length, **inputs.keywords)  # type: ignore[arg-type, call-arg]
    assert not out[0, :, 0].any()
    assert not out[1].any()
    assert (lse[0, :, 0] == -math.inf).all()
    assert (lse[1] == -math.inf).all()
    assert torch.isfinite(lse[0, :, 1:]).all()


@pytest.mark.parametrize("stretches", [1, 3])
@pytest.mark.parametrize("which", [2, 3], ids=["c_kv", "k_pe"])
def test_live_nan_reaches_its_batch_row_alone(which: int, stretches: int) -> None:
    inputs = make_inputs(LatentCase(batch=2))
    inputs.tensors[which][0, 5] = math.nan  # type: ignore[index]
    out, _ = mla_decode_cpu(*inputs.tensors, **inputs.keywords, stretches=stretches)  # type: ignore[arg-type]
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_auto_takes_it_on_a_cpu() -> None:
    case = LatentCase(length=True, poison=True)
    inputs = make_inputs(case)
    auto, forced = (mla_decode(*inputs.tensors, **inputs.keywords, impl=impl) for impl in ("auto", "cpu"))
    assert all(torch.equal(a, f) for a, f in zip(auto, forced, strict=True))
    torch.library.opcheck(mla_decode, make_inputs(replace(case, dtype=torch.bfloat16)).tensors, inputs.keywords)


def test_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = registry.find("mla_decode", "cpu")
    inputs = make_inputs(LatentCase())
    assert kernel.supports(*inputs.tensors, **inputs.keywords) == []
    meta = [None if x is None else x.to("meta") for x in inputs.tensors]
    assert "needs a CPU" in kernel.supports(*meta, **inputs.keywords)[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in kernel.supports(*inputs.tensors, **inputs.keywords)[0]
