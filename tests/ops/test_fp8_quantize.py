"""FP8 with a scale a group: errors within half a step of the type, and an exact answer at the ends of the range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacompile.errors import UnsupportedInputError
from mlacompile.ops.fp8_quantize import (
    FP8_DTYPES,
    SMALLEST_DESCALE,
    fp8_dequantize,
    fp8_dequantize_reference,
    fp8_quantize,
    fp8_quantize_reference,
)

#: Half the relative spacing of normal values, and the smallest positive value.
HALF_STEP = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
SMALLEST = {torch.float8_e4m3fn: 2.0**-9, torch.float8_e5m2: 2.0**-16}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def allowed(x: torch.Tensor, descale: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The largest error of each value, in float64.

    A quotient is rounded to the type: half a step, relative for normal values, of the smallest value below. The float32
    quotient is off by 2**-24 of itself before that, and so may be what it was divided by when x was rounded to float32.
    """
    x = x.double().abs()
    scales = descale.double().repeat_interleave(group, dim=-1)[..., : x.shape[-1]]
    rounding = torch.maximum(HALF_STEP[dtype] * x, SMALLEST[dtype] * scales / 2)
    return rounding * (1 + 2.0**-23) + x * 2.0**-23 + 2.0**-149


def values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if kind == "outliers":
        x[..., 3 % shape[-1]] = 1e4
    elif kind == "tiny":
        x *= 2.0**-140
    elif kind == "wide":
        x *= torch.exp2(torch.randint(-30, 12, shape, generator=torch.Generator().manual_seed(seed + 1)).double())
    elif kind == "zeros":
        x[..., ::2] = 0.0
        x[0] = -0.0
    return x.to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 3),
    width=st.integers(1, 300),
    group=st.sampled_from([1, 7, 32, 128, 512]),
    kind=st.sampled_from(["plain", "outliers", "tiny", "wide", "zeros"]),
    x_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FP8_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_what_is_read_back_is_within_half_a_step(
    rows: int, width: int, group: int, kind: str, x_dtype: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    x = values((rows, width), kind, x_dtype, seed)
    q, descale = fp8_quantize(x, group, dtype)
    assert (q.shape, descale.shape) == (x.shape, (rows, math.ceil(width / group)))
    assert (q.dtype, descale.dtype) == (dtype, torch.float32)
    assert bool((descale >= SMALLEST_DESCALE).all())
    scales = descale.double().repeat_interleave(group, dim=-1)[..., :width]
    error = (x.double() - q.double() * scales).abs()
    assert bool((error <= allowed(x, descale, group, dtype)).all())
    back = fp8_dequantize(q, descale, group, torch.float32)
    product = q.double() * scales
    assert bool(((back.double() - product).abs() <= product.abs() * 2.0**-24 + 2.0**-150).all())
    assert torch.equal(fp8_dequantize(q, descale, group, torch.bfloat16), back.bfloat16())


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_the_largest_value_of_a_group_takes_the_whole_range(dtype: torch.dtype) -> None:
    x = torch.tensor([[3.0, -7.0, 0.1, 2.0, 1e4, -1.0]])
    q, descale = fp8_quantize(x, 3, dtype)
    largest = torch.finfo(dtype).max
    assert torch.equal(descale, torch.tensor([[7.0 / largest, 1e4 / largest]]))
    assert (float(q[0, 1].float()), float(q[0, 4].float())) == (-largest, largest)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_zeros_read_back_as_zeros_with_their_signs(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, -0.0, 0.0, 5.0]])
    q, descale = fp8_quantize(x, 2, dtype)
    assert descale[0, 0] == 1
    back = fp8_dequantize(q, descale, 2, torch.float32)
    assert back.signbit().tolist() == [[False, True, False, False]]
    assert back[0, 2] == 0
    unwritten = fp8_dequantize(torch.zeros(1, 4, dtype=dtype), torch.zeros(1, 2), 2, torch.float32)
    assert torch.equal(unwritten, torch.zeros(1, 4)), "memory of zeros reads as zeros"


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_with_a_value_that_is_not_finite_reads_as_nan_and_no_other_does(dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(2, 384)
    x[1, 130] = bad
    back = fp8_dequantize(*fp8_quantize(x, 128, dtype), 128, torch.bfloat16)
    assert back[1, 128:256].isnan().all()
    back[1, 128:256] = 0
    assert back.isfinite().all()


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_denormals_lose_precision_and_then_vanish_but_never_divide_by_zero(dtype: torch.dtype) -> None:
    smallest = SMALLEST[dtype] * SMALLEST_DESCALE  # what one step of the type is worth at the smallest descale
    x = torch.tensor([[smallest, smallest * 0.4, -3 * smallest, 2.0**-149]])
    q, descale = fp8_quantize(x, 4, dtype)
    assert float(descale) == SMALLEST_DESCALE
    back = fp8_dequantize(q, descale, 4, torch.float32)
    assert back.tolist() == [[smallest, 0.0, -3 * smallest, 0.0 if smallest > 2.0**-148 else 2.0**-149]]


def test_views_into_bytes_are_read_in_place() -> None:
    """The latent and its scales as they lie in one run of bytes, rows far apart."""
    x = torch.randn(2, 5, 200)
    q, descale = fp8_quantize(x, 128, torch.float8_e4m3fn)
    run = torch.full((2, 5, 256), 255, dtype=torch.uint8)
    run[..., :200] = q.view(torch.uint8)
    run[..., 208:216] = descale.view(torch.uint8)
    got = fp8_dequantize(
        run[..., :200].view(torch.float8_e4m3fn), run[..., 208:216].view(torch.float32), 128, torch.float32
    )
    assert torch.equal(got, fp8_dequantize(q, descale, 128, torch.float32))


@pytest.mark.parametrize("width", [64, 200, 512])
def test_compiled_bodies_agree_bit_for_bit(width: int) -> None:
    x = values((3, width), "wide", torch.bfloat16, 1)

    def there_and_back(x: torch.Tensor) -> Any:
        q, descale = fp8_quantize_reference(x, 128, torch.float8_e4m3fn)
        return q.view(torch.uint8), descale, fp8_dequantize_reference(q, descale, 128, torch.bfloat16)

    for got, want in zip(torch.compile(there_and_back)(x), there_and_back(x), strict=True):
        assert torch.equal(got, want)


def test_the_ops_obey_their_schemas() -> None:
    x = torch.randn(2, 200)
    checks = ("test_faketensor", "test_autograd_registration")  # the others compare, which PyTorch cannot in FP8
    torch.library.opcheck(fp8_quantize, (x, 128, torch.float8_e4m3fn), test_utils=checks)
    q, descale = fp8_quantize(x, 128, torch.float8_e4m3fn)
    torch.library.opcheck(fp8_dequantize, (q, descale, 128, torch.bfloat16), test_utils=checks)


def test_wrong_scales_and_types_are_refused() -> None:
    q, descale = fp8_quantize(torch.randn(2, 200), 128, torch.float8_e4m3fn)
    with pytest.raises(
        UnsupportedInputError, match=r"descale of torch.float32 \[2, 1\].*expected torch.float32 \[2, 2\]"
    ):
        fp8_dequantize(q, descale[:, :1], 128, torch.float32)
    with pytest.raises(UnsupportedInputError, match="pass 1 / scale if yours divides"):
        fp8_dequantize(q, descale.double(), 128, torch.float32)
    with pytest.raises(UnsupportedInputError, match=r"got torch.uint8; expected torch.float8_e4m3fn"):
        fp8_dequantize(q.view(torch.uint8), descale, 128, torch.float32)
    with pytest.raises(UnsupportedInputError, match=r"got torch.float16; expected torch.float8"):
        fp8_quantize(torch.randn(2), 2, torch.float16)
    with pytest.raises(UnsupportedInputError, match="group of 0"):
        fp8_quantize(torch.randn(2), 0, torch.float8_e4m3fn)
    with pytest.raises(UnsupportedInputError, match=r"x of torch.int64"):
        fp8_quantize(torch.arange(2), 2, torch.float8_e4m3fn)
