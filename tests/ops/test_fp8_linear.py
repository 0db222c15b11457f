"""Scaled FP8 products against float64: the op adds rounding in float32 and nothing else to what quantization did."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacompile.errors import UnsupportedInputError
from mlacompile.ops.fp8_linear import (
    fp8_dequantize_weight,
    fp8_linear,
    fp8_linear_reference,
    fp8_quantize_weight,
)
from mlacompile.ops.fp8_quantize import SMALLEST_DESCALE, fp8_quantize
from tests.ops.test_fp8_quantize import HALF_STEP, SMALLEST, values

E4M3 = torch.float8_e4m3fn
SIZES = st.integers(1, 400)


def whole(descale: torch.Tensor, shape: tuple[int, ...], rows: int) -> torch.Tensor:
    """The scale of every element, in float64."""
    return descale.double().repeat_interleave(rows, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


@settings(max_examples=40, deadline=None)
@given(
    n=SIZES, k=SIZES, kind=st.sampled_from(["plain", "outliers", "tiny", "wide", "zeros"]), seed=st.integers(0, 2**16)
)
def test_a_weight_is_within_half_a_step_block_by_block(n: int, k: int, kind: str, seed: int) -> None:
    weight = values((n, k), kind, torch.bfloat16, seed)
    q, descale = fp8_quantize_weight(weight)
    assert descale.shape == (math.ceil(n / 128), math.ceil(k / 128))
    scales = whole(descale, (n, k), 128)
    error = (weight.double() - q.double() * scales).abs()
    size = weight.double().abs()
    bound = torch.maximum(HALF_STEP[E4M3] * size, SMALLEST[E4M3] * scales / 2) * (1 + 2.0**-23) + size * 2.0**-23
    assert bool((error <= bound + 2.0**-149).all())
    assert bool((descale >= SMALLEST_DESCALE).all())
    back = fp8_dequantize_weight(q, descale, torch.float32)
    product = q.double() * scales
    assert bool(((back.double() - product).abs() <= product.abs() * 2.0**-24 + 2.0**-150).all())


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 9), n=SIZES, k=SIZES, kind=st.sampled_from(["plain", "outliers"]), seed=st.integers(0, 99))
def test_products_differ_from_float64_by_rounding_in_float32(m: int, n: int, k: int, kind: str, seed: int) -> None:
    x, x_descale = fp8_quantize(values((m, k), kind, torch.float32, seed), 128, E4M3)
    w, w_descale = fp8_quantize_weight(values((n, k), "plain", torch.float32, seed + 1))
    left, right = x.double() * whole(x_descale, (m, k), 1), w.double() * whole(w_descale, (n, k), 128)
    got = fp8_linear(x, x_descale, w, w_descale, torch.float32)
    # A rounding of either factor, one of each product, and up to k of the sum, each relative to a partial sum that is
    # at most the sum of absolute values.
    bound = (k + 3) * 2.0**-24 * (left.abs() @ right.abs().t())
    assert bool(((got.double() - left @ right.t()).abs() <= bound * (1 + 2.0**-10) + 2.0**-149).all())
    assert torch.equal(fp8_linear(x, x_descale, w, w_descale, torch.bfloat16), got.bfloat16())


def test_zero_blocks_and_blocks_that_are_not_finite() -> None:
    weight = torch.randn(200, 300)
    weight[:128, :128] = 0
    weight[150, 290] = torch.inf
    q, descale = fp8_quantize_weight(weight)
    assert descale[0, 0] == 1
    assert descale[1, 2].isnan()
    back = fp8_dequantize_weight(q, descale, torch.float32)
    assert back[128:, 256:].isnan().all()
    back[128:, 256:] = 0
    assert back.isfinite().all()
    assert not back[:128, :128].any()


def test_a_compiled_product_agrees() -> None:
    x = fp8_quantize(torch.randn(3, 200), 128, E4M3)
    w = fp8_quantize_weight(torch.randn(150, 200))
    want = fp8_linear_reference(*x, *w, torch.float32)
    got = torch.compile(fp8_linear_reference)(*x, *w, torch.float32)
    assert float((got - want).abs().max()) <= 200 * 2.0**-23 * float(want.abs().max())


def test_shapes_are_checked_and_fakes_agree() -> None:
    x = fp8_quantize(torch.randn(3, 200), 128, E4M3)
    w = fp8_quantize_weight(torch.randn(150, 200))
    for op, args in (
        (fp8_quantize_weight, (torch.randn(150, 200),)),
        (fp8_dequantize_weight, (*w, torch.bfloat16)),
        (fp8_linear, (*x, *w, torch.bfloat16)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_faketensor",))
    with pytest.raises(UnsupportedInputError, match=r"with scales of torch.float32 \[2, 1\]; expected .* \[2, 2\]"):
        fp8_dequantize_weight(w[0], w[1][:, :1], torch.float32)
    with pytest.raises(UnsupportedInputError, match=r"Scales in e8m0 become float32"):
        fp8_linear(*x, w[0], w[1].to(torch.float8_e8m0fnu), torch.float32)
    with pytest.raises(UnsupportedInputError, match=r"\[3, 1\] for a weight \[150, 200\]; expected"):
        fp8_linear(x[0], x[1][:, :1], *w, torch.float32)
    with pytest.raises(UnsupportedInputError, match="expected a floating point matrix"):
        fp8_quantize_weight(torch.zeros(2, 2, dtype=torch.int32))
