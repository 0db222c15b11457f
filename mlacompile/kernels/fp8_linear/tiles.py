"""Triton kernels of ``fp8_linear`` for any number of rows: the weight is the left factor of each product.

    program:  BLOCK_N rows of the weight × BLOCK_M rows of x, K in steps of 128, one scale block each

``wgmma`` wants 64 rows or more on its left and as few as 8 columns on its right, so the weight, which has many rows,
goes to the left and few rows of x waste nothing. Both come by TMA, which leaves registers for more programs an SM and
reads zeros beyond the edges. Each step is a product of its own, scaled and added in float32: the tensor cores' own sum
of FP8 products keeps fewer bits, and one of 128 terms is short enough for that not to matter in 16 bits. For a result
in float32 both are multiplied in float16. x that is not quantized meets the weight in its own 16 bits. Either holds
every e4m3 value exactly.

Where one weight has too few tiles to keep all memory channels busy, K is divided too, and a second kernel adds the
parts in a fixed order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mlacompile.kernels.parts import _add_parts


@triton.jit
def _widened(b, dtype: tl.constexpr):
    """e4m3 in 16 bits. By way of float32: a direct cast from float16 to bfloat16 is slow, and this keeps NaN."""
    half = b.to(tl.float16)
    return half if dtype == tl.float16 else half.to(tl.float32).to(dtype)


@triton.jit
def _tile(
    i_n, i_m, i_z, d_x, p_x_descale, d_w, p_descale, d_w2, p_descale2, p_out, M, N, N1, K, K_PART,
    stride_xsb, stride_xsm, stride_xsk, stride_sb, stride_sn, stride_sn2, stride_ob,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_HEAD: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    TWO: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of the result: block i_n of weight rows, i_m of rows of x, of a head or a part of K, i_z."""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if SPLIT:
        begin = i_z * K_PART
        end = tl.minimum(begin + K_PART, K)
    else:
        begin = 0
        end = K
        p_descale += i_z * stride_sb
    n = i_n * BLOCK_N
    if TWO and n >= N1:  # a loop for each weight would take twice the shared memory
        n -= N1
        d_w = d_w2
        p_descale = p_descale2 + n // 128 * stride_sn2
    else:
        p_descale += n // 128 * stride_sn
    if p_x_descale is not None:
        if not SPLIT:
            p_x_descale += i_z.to(tl.int64) * stride_xsb
        p_x_descale += tl.minimum(o_m, M - 1).to(tl.int64) * stride_xsm
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(begin, end, 128, num_stages=STAGES):
        if BY_HEAD:
            b_w = d_w.load([i_z, n, k]).reshape(BLOCK_N, 128)
            b_x = d_x.load([i_z, i_m * BLOCK_M, k]).reshape(BLOCK_M, 128)
        else:
            b_w = d_w.load([n, k])
            b_x = d_x.load([i_m * BLOCK_M, k])
        factor = tl.load(p_descale + k // 128)
        if p_x_descale is not None:
            x_descale = tl.load(p_x_descale + (k // 128) * stride_xsk)
            if EXACT:
                product = tl.dot(_widened(b_w, tl.float16), _widened(b_x, tl.float16).T)
            else:
                product = tl.dot(b_w, b_x.T)
            acc += product * (x_descale * factor)[None, :]
        else:
            acc += tl.dot(_widened(b_w, b_x.dtype), b_x.T) * factor
    p_out += i_z.to(tl.int64) * stride_ob + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    tl.store(p_out, acc.to(p_out.dtype.element_ty), mask=(o_n < N)[:, None] & (o_m < M)[None, :])


@triton.jit
def _fp8_tiles_kernel(
    d_x, p_x_descale, d_w, p_descale, d_w2, p_descale2, p_out, M, N, N1, K, K_PART,
    stride_xsb, stride_xsm, stride_xsk, stride_sb, stride_sn, stride_sn2, stride_ob,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_HEAD: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    TWO: tl.constexpr, PDL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of weight rows, blocks of rows of x, heads, or parts of K if SPLIT). A part has K_PART columns.

    d_x, d_w: descriptors of [(H,) M, K] and [(H,) N, K]; what lies beyond is read as zeros. TWO: weight rows from N1
    on, a multiple of BLOCK_N, are those of a second weight. PDL: this kernel may be launched before the one before it
    has ended, and the next one as soon as all programs run; each waits where it begins to read. EXACT: products are
    summed in all bits of float32.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    _tile(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), d_x, p_x_descale, d_w, p_descale, d_w2, p_descale2, p_out,
        M, N, N1, K, K_PART, stride_xsb, stride_xsm, stride_xsk, stride_sb, stride_sn, stride_sn2, stride_ob,
        BLOCK_M, BLOCK_N, BY_HEAD, SPLIT, STAGES, TWO, EXACT,
    )  # fmt: skip


@triton.jit
def _fp8_sum_kernel(p_part, p_out, SIZE, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
                    DROP: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """Adds PARTS float32 parts of SIZE elements each, in order. DROP: and drops them, which are whole lines then."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    _add_parts(p_part, SIZE, p_out, tl.program_id(0), SIZE, PARTS, BLOCK, DROP, THREADS)
