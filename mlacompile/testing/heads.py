"""Inputs of products of heads, as projections leave them, and how far results may be off that leave in FP8."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.ops.fp8_linear import E4M3
from mlacompile.ops.fp8_quantize import fp8_dequantize
from mlacompile.testing.scaled import Product, exact, make_product


def make_heads(
    m: int, heads: int, n: int, k: int, *, kind: str = "plain", dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Product:  # fmt: skip
    """x ``[heads, m, k]`` of a kind, part of rows that hold all heads of a token, and a weight for each head. What else
    is in these rows, and rows behind them, are NaN: nobody may read them."""
    product = make_product(m, n, k, heads=heads, kind=kind, dtype=dtype, device=device)
    rows = torch.full((m + 64, heads, k + 64), torch.nan, dtype=dtype, device=device)
    rows[:m, :, :k] = product.x.transpose(0, 1)
    return replace(product, x=rows[:m, :, :k].transpose(0, 1))


def worst_quantized(product: Product, results: tuple[Tensor, Tensor]) -> str:
    """What is wrong with results of ``heads_quantized``, or nothing.

    A result y in 16 bits is as far from the exact one as ``exact`` allows. In e4m3, of 3 bits behind the first, what is
    stored of it is half a step off: 2^-4 of y, and below the smallest normal number, 2^-6, half of 2^-9; both times the
    scale. To that comes what float32 makes of y / scale · scale. A scale is the largest y / 448, so as far off as that.
    """
    q, descale = results
    (heads, m, _), width = product.x.shape, SCALE_GROUP
    if q.shape != (m, heads * width) or q.dtype != E4M3 or descale.shape != (m, heads):
        return f"results are {q.dtype} {list(q.shape)} and {list(descale.shape)}"
    if not q.is_contiguous() or not descale.is_contiguous():
        return "results are not contiguous"
    want, bound = (t.transpose(0, 1) for t in exact(product, product.x.dtype))  # [m, heads, 128]
    peak, peak_bound = want.abs().amax(-1), bound.amax(-1)
    scales = descale.double()
    off = (scales - (peak / 448).clamp(min=2.0**-126)).abs()
    zeros = (peak <= peak_bound) & (scales == 1)
    if not ((off <= peak_bound / 448 + scales * 2.0**-22) | zeros).all():
        return f"scales are off by {float((off / scales).max()):.1e}"
    if not (scales[(want == 0).all(-1)] == 1).all():
        return "a group of zeros has a scale"
    step = torch.maximum((want.abs() + bound) * 2.0**-4, scales[..., None] * 2.0**-10)
    values = fp8_dequantize(q, descale, width, torch.float64).view_as(want)
    excess = ((values - want).abs() / (bound + step * (1 + 2.0**-16))).nan_to_num(nan=torch.inf)
    return "" if (excess <= 1).all() else f"values are off by {float(excess.max()):.2f} times what they may be"
