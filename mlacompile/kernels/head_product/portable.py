"""Triton kernel of ``head_product``: a tile of one head's matrix a program, read in 16-byte pieces, summed in float32.

    ALONG_K: K is contiguous (out · W_UV reads w_uv [V, R] by rows)         tile [BLOCK_N, BLOCK_K], summed over K
    else:    N is contiguous (q · W_UK reads w_uk [N, R] by columns)        tile [BLOCK_K, BLOCK_N], summed over K

Both are exact views of the model's weight: neither is copied or transposed.

EARLY: the kernel is launched while the one before it still runs, and has its first tile of weights in registers when
that ends. Attention of one sequence leaves most of the memory bandwidth, and often most of the device, idle.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _head_product_kernel(
    p_x, p_w, p_out, K, N, stride_xh, stride_wh, stride_w,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALONG_K: tl.constexpr, WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: column blocks, heads. stride_w: of the dimension that is not contiguous. WHOLE: K is a single step."""
    i, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    p_x += h * stride_xh
    if ALONG_K:
        p = p_w + h * stride_wh + o_n[:, None] * stride_w + o_k[None, :]
        mask = m_n[:, None] & (o_k < K)[None, :]
        step = BLOCK_K
    else:
        p = p_w + h * stride_wh + o_k[:, None] * stride_w + o_n[None, :]
        mask = (o_k < K)[:, None] & m_n[None, :]
        step = BLOCK_K * stride_w
    b_w = tl.load(p, mask=mask, other=0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    acc = _times(b_w, p_x, o_k, K, ALONG_K)
    if not WHOLE:
        for k in range(BLOCK_K, K, BLOCK_K):
            p += step
            more = k + o_k < K
            mask = m_n[:, None] & more[None, :] if ALONG_K else more[:, None] & m_n[None, :]
            b_w = tl.load(p, mask=mask, other=0.0, eviction_policy="evict_first")
            acc += _times(b_w, p_x, k + o_k, K, ALONG_K)
    total = tl.sum(acc, 1 if ALONG_K else 0)
    tl.store(p_out + h * N + o_n, total.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def _times(b_w, p_x, o_k, K, ALONG_K: tl.constexpr):
    """A tile of weights times the elements o_k of the row."""
    b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    return b_w.to(tl.float32) * (b_x[None, :] if ALONG_K else b_x[:, None])
