"""Triton kernels of ``fp8_linear`` for any number of rows: the weight is the left factor of each product.

    program:  BLOCK_N rows of the weight × BLOCK_M rows of x, K in steps of 128, one scale block each

``wgmma`` wants 64 rows or more on its left and as few as 8 columns on its right, so the weight, which has many rows,
goes to the left and few rows of x waste nothing. Each step is a product of its own, scaled and added in float32: the
tensor cores' own sum of FP8 products keeps fewer bits, and one of 128 terms is short enough for that not to matter. x
that is not quantized meets the weight in its own 16 bits, which hold every e4m3 value exactly.

Where one weight has too few tiles to keep all memory channels busy, K is divided too, and a second kernel adds the
parts in a fixed order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def _widened(b, dtype: tl.constexpr):
    """e4m3 in 16 bits. By way of float32: a direct cast from float16 to bfloat16 is slow, and this keeps NaN."""
    half = b.to(tl.float16)
    return half if dtype == tl.float16 else half.to(tl.float32).to(dtype)


@triton.jit
def _fp8_tiles_kernel(
    p_x, p_x_descale, p_w, p_descale, p_out, M, N, K, K_PART,
    stride_xb, stride_xm, stride_xsb, stride_xsm, stride_xsk, stride_wb, stride_wn, stride_sb, stride_sn, stride_ob,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of weight rows, blocks of rows of x, heads, or parts of K if SPLIT). A part has K_PART columns."""
    i_n = tl.program_id(0)
    i_z = tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, 128)
    if SPLIT:
        begin = i_z * K_PART
        end = tl.minimum(begin + K_PART, K)
    else:
        begin = 0
        end = K
        p_x += i_z.to(tl.int64) * stride_xb
        p_w += i_z.to(tl.int64) * stride_wb
        p_descale += i_z * stride_sb
    m_x = o_m < M
    m_in = tl.minimum(o_m, M - 1).to(tl.int64)
    p_w += tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * stride_wn + o_k[None, :]
    p_x += m_in[None, :] * stride_xm + o_k[:, None]
    p_descale += (i_n * BLOCK_N // 128) * stride_sn
    if p_x_descale is not None:
        if not SPLIT:
            p_x_descale += i_z.to(tl.int64) * stride_xsb
        p_x_descale += m_in * stride_xsm
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(begin, end, 128, num_stages=STAGES):
        if EVEN_K:
            b_w = tl.load(p_w + k, eviction_policy="evict_first")
            b_x = tl.load(p_x + k, mask=m_x[None, :], other=0.0)
        else:
            b_w = tl.load(p_w + k, mask=(k + o_k < K)[None, :], other=0.0, eviction_policy="evict_first")
            b_x = tl.load(p_x + k, mask=(k + o_k < K)[:, None] & m_x[None, :], other=0.0)
        descale = tl.load(p_descale + k // 128)
        if p_x_descale is not None:
            x_descale = tl.load(p_x_descale + (k // 128) * stride_xsk)
            acc += tl.dot(b_w, b_x) * (descale * x_descale)[None, :]
        else:
            acc += tl.dot(_widened(b_w, p_x.dtype.element_ty), b_x) * descale
    p_out += i_z.to(tl.int64) * stride_ob + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    tl.store(p_out, acc.to(p_out.dtype.element_ty), mask=(o_n < N)[:, None] & (o_m < M)[None, :])


@triton.jit
def _fp8_sum_kernel(p_part, p_out, SIZE, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Adds PARTS float32 parts of SIZE elements each, in order."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        acc += tl.load(p_part + i * SIZE + o, mask=o < SIZE, other=0.0)
    tl.store(p_out + o, acc.to(p_out.dtype.element_ty), mask=o < SIZE)
