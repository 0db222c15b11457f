"""The Hopper kernel with FP8 products on a GPU against float64 over what its cache says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlacompile.kernels.mla_decode.supports import hopper_shape_reasons, turned_reasons
from mlacompile.ops import mla_decode
from mlacompile.testing.latents import LatentCase, LatentInputs, exact, make_inputs, paged, quantized, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

#: Unit roundoff of what the output is stored in; P is float16.
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
#: A sum of FP8 products drops what lies 2^13 below its largest addend: 33 addends a step, 32 steps, errors of either
#: sign, 2^-13 * sqrt(33 * 32 / 3) of a sum that is a twentieth of its addends' sizes, and five times that at worst.
SUM_UNIT = 2**-10
#: The bound on the norm of the error that other kernels keep with products in 16 bits.
NORM = 3e-3

DEEPSEEK = LatentCase(batch=3, heads=16, tokens=1000, rank=512, rope=64, dtype=torch.bfloat16)
RAGGED: dict[str, Any] = {"start": True, "length": True, "poison": True}


def variant(**changes: Any) -> LatentCase:
    return replace(DEEPSEEK, **changes)


#: And the tokens of a page, 0 for a contiguous cache.
CASES = [
    *((variant(heads=heads, **RAGGED), 64) for heads in (1, 3, 16, 20, 40, 64, 128, 130)),
    *((variant(heads=heads, queries=s, causal=True, **RAGGED), 64) for heads, s in ((16, 4), (128, 2), (128, 5))),
    *((variant(tokens=tokens, length=True, poison=True), 64) for tokens in (1, 63, 65)),
    (variant(heads=128, **RAGGED), 0),
    (variant(batch=1, tokens=67), 0),
    (variant(batch=1, tokens=20_000, heads=128), 64),
    (variant(batch=300, tokens=130, heads=130, **RAGGED), 256),
    (variant(rank=256, rope=0, **RAGGED), 32),
    (variant(heads=7, rank=128, **RAGGED), 0),
    (variant(heads=64, rank=384, rope=0, dtype=torch.float16, **RAGGED), 0),
    (variant(queries=8, rank=256, rope=32, causal=True, **RAGGED), 128),
    (variant(heads=128, dtype=torch.float16, **RAGGED), 64),
]


def turned(inputs: LatentInputs) -> tuple[Tensor, Tensor]:
    """The kernel, three times over: a result that changes is a race."""
    from mlacompile.kernels.mla_decode.hopper_launch import hopper_launches, hopper_shape
    from mlacompile.kernels.mla_decode.launch import device_of
    from mlacompile.kernels.mla_decode.plan import hopper_plan

    q_latent, q_pe, c_kv, k_pe, mask, start, length, table, descale = inputs.tensors
    assert q_latent is not None
    assert c_kv is not None
    assert descale is not None
    assert not hopper_shape_reasons(q_latent, q_pe, c_kv, k_pe, mask, table, descale, inputs.keywords["scale"])
    assert not turned_reasons(c_kv, descale)
    tensors = (q_latent, q_pe, c_kv, k_pe, start, length, table, descale)
    plan = replace(hopper_plan(hopper_shape(tensors), device_of(q_latent.device)), turned=True)
    results = []
    for _ in range(3):
        out = q_latent.new_full(q_latent.shape, math.nan)  # contiguous, whatever the queries are
        lse = q_latent.new_full(q_latent.shape[:3], math.nan, dtype=torch.float32)
        for launch in hopper_launches(tensors, out, lse, plan, **inputs.keywords):
            launch.run()
        results.append((out, lse))
    assert all(torch.equal(out.nan_to_num(7), results[0][0].nan_to_num(7)) for out, _ in results)
    return results[0]


def check(said: LatentInputs, out: Tensor, lse: Tensor) -> None:
    want = exact(said, unit=2**-22, operand_unit=UNIT[out.dtype], key_unit=SUM_UNIT)
    assert not worst(out, want.out, want.out_bound), f"out: {worst(out, want.out, want.out_bound)}"
    assert not worst(lse, want.lse, want.lse_bound), f"lse: {worst(lse, want.lse, want.lse_bound)}"
    if want.out.norm() > 0:
        assert (out.double() - want.out).norm() / want.out.norm() <= NORM


@pytest.mark.parametrize(("case", "page"), CASES, ids=lambda x: f"page{x}" if isinstance(x, int) else str(x))
def test_parity(case: LatentCase, page: int) -> None:
    stored, said = quantized(make_inputs(case, device="cuda"))
    check(said, *turned(paged(stored, page) if page else stored))


def test_few_rows_are_multiplied_so_unasked() -> None:
    stored, _ = quantized(make_inputs(variant(**RAGGED), device="cuda"))
    stored = paged(stored, 64)
    for got, want in zip(mla_decode(*stored.tensors, **stored.keywords, impl="gluon"), turned(stored), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("exponent", [-30, 0, 12])
def test_queries_and_factors_of_every_size(exponent: int, heads: int) -> None:
    """Rows of queries and factors of tokens far from 1, beyond the range of float16; a row of zeros."""
    inputs = make_inputs(variant(heads=heads, tokens=300, rope=0), device="cuda")
    q_latent, _, c_kv, *rest = inputs.tensors
    assert q_latent is not None
    assert c_kv is not None
    sizes = torch.tensor([2.0**k for k in range(-20, 1, 4)], device="cuda")
    q = q_latent * (sizes[torch.arange(heads) % len(sizes)] * 2.0**-exponent)[:, None, None]
    q[:, 3] = 0
    keys = c_kv * (sizes.repeat(50) * 2.0**exponent)[:, None]
    scaled = LatentInputs((q.to(q_latent.dtype), None, keys.to(c_kv.dtype), *rest), inputs.keywords)
    stored, said = quantized(scaled)
    check(said, *turned(stored))


@pytest.mark.parametrize("heads", [16, 64])
def test_queries_that_are_not_finite_make_their_rows_nan(heads: int) -> None:
    stored, _ = quantized(make_inputs(variant(heads=heads, tokens=200), device="cuda"))
    stored = paged(stored, 64)
    q_latent, q_pe = stored.tensors[:2]
    assert q_latent is not None
    assert q_pe is not None
    q_latent[0, 5, 0, 77], q_latent[1, heads - 4, 0, 3], q_pe[2, 9, 0, 1] = math.inf, math.nan, -math.inf
    out, lse = turned(stored)
    wrong = torch.zeros(3, heads, dtype=torch.bool, device="cuda")
    wrong[0, 5] = wrong[1, heads - 4] = wrong[2, 9] = True
    assert torch.equal(out.isnan().all(-1)[:, :, 0], wrong)
    assert torch.equal(out.isnan().any(-1)[:, :, 0], wrong)
    assert torch.equal(lse.isnan()[:, :, 0], wrong)


def test_nan_in_a_live_row_reaches_the_output() -> None:
    stored, _ = quantized(make_inputs(variant(tokens=200), device="cuda"))
    c_kv, descale = stored.tensors[2], stored.tensors[8]
    assert c_kv is not None
    assert descale is not None
    c_kv.view(torch.uint8)[0, 130, 77] = 0x7F
    descale[1, 3] = math.nan
    out, lse = turned(stored)
    assert out[:2].isnan().all()
    assert lse[:2].isnan().all()
    assert not out[2].isnan().any()
