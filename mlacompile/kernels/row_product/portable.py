"""Triton kernel of ``row_product``: a few weight rows a program, read in 16-byte pieces, summed in float32.

    program:  rows [i · BLOCK_N, (i + 1) · BLOCK_N) of one weight, all of K in steps of BLOCK_K

No row is shared between programs, so there is no second pass; many small programs keep enough loads in flight. Two
weights that multiply the same row share a launch.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the hints of kernel parameters itself.)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(
    p_x, p_w, p_out, i, N, K, stride_wn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = (o_n < N)[:, None]
    p = p_w + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * stride_wn + o_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_x + k + o_k)
            b_w = tl.load(p + k, eviction_policy="evict_first")
        else:
            m_k = k + o_k < K
            b_x = tl.load(p_x + k + o_k, mask=m_k, other=0.0)
            b_w = tl.load(p + k, mask=m_n & m_k[None, :], other=0.0, eviction_policy="evict_first")
        acc += b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
    tl.store(p_out + o_n, tl.sum(acc, 1).to(p_out.dtype.element_ty), mask=o_n < N)


@triton.jit
def _row_product_kernel(
    p_x, p_w, p_out, N, stride_wn, p_w2, p_out2, N2, stride_wn2, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Grid: the row blocks of the first weight, then (TWO) those of the second."""
    i = tl.program_id(0)
    n_first = tl.cdiv(N, BLOCK_N)
    if TWO:
        if i < n_first:
            _rows(p_x, p_w, p_out, i, N, K, stride_wn, BLOCK_N, BLOCK_K, EVEN_K)
        else:
            _rows(p_x, p_w2, p_out2, i - n_first, N2, K, stride_wn2, BLOCK_N, BLOCK_K, EVEN_K)
    else:
        _rows(p_x, p_w, p_out, i, N, K, stride_wn, BLOCK_N, BLOCK_K, EVEN_K)
