"""Triton kernel of ``head_product``: a tile of one head's matrix a program, read in 16-byte pieces, summed in float32.

    ALONG_K: K is contiguous (out · W_UV reads w_uv [V, R] by rows)         tile [BLOCK_N, BLOCK_K], summed over K
    else:    N is contiguous (q · W_UK reads w_uk [N, R] by columns)        tile [BLOCK_K, BLOCK_N], summed over K

Both are exact views of the model's weight: neither is copied or transposed.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _head_product_kernel(
    p_x, p_w, p_out, K, N, stride_xh, stride_wh, stride_w,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALONG_K: tl.constexpr,
):  # fmt: skip
    """Grid: column blocks, heads. stride_w: of the dimension of the matrix that is not contiguous."""
    i, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    p_x += h * stride_xh
    p_w += h * stride_wh
    if ALONG_K:
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        p = p_w + o_n[:, None] * stride_w + o_k[None, :]
        for k in range(0, K, BLOCK_K):
            m_k = k + o_k < K
            b_x = tl.load(p_x + k + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_w = tl.load(p + k, mask=m_n[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first")
            acc += b_w.to(tl.float32) * b_x[None, :]
        total = tl.sum(acc, 1)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        p = p_w + o_k[:, None] * stride_w + o_n[None, :]
        for k in range(0, K, BLOCK_K):
            m_k = k + o_k < K
            b_x = tl.load(p_x + k + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_w = tl.load(p + k * stride_w, mask=m_n[None, :] & m_k[:, None], other=0.0, eviction_policy="evict_first")
            acc += b_w.to(tl.float32) * b_x[:, None]
        total = tl.sum(acc, 0)
    tl.store(p_out + h * N + o_n, total.to(p_out.dtype.element_ty), mask=m_n)
