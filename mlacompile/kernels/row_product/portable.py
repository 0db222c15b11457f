"""Triton kernel of ``row_product``: a few weight rows a program, read in 16-byte pieces, summed in float32.

    program:  rows [i · BLOCK_N, (i + 1) · BLOCK_N) of one weight (GATE: of both), all of K in steps of BLOCK_K

No row is shared between programs, so there is no second pass; many small programs keep enough loads in flight. Two
weights that multiply the same row share a launch. A norm is a factor that every program finds for itself: the sum of
squares comes with the row it reads anyway, and one over its root is multiplied on at the end.

EARLY: the kernel is launched while the one before it still runs, and has its first tile of weights in registers when
that ends.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the hints of kernel parameters itself.)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _tile(p, o_k, m_n, K, EVEN_K: tl.constexpr):
    """Weights at p, columns o_k."""
    if EVEN_K:
        return tl.load(p, eviction_policy="evict_first")
    else:
        return tl.load(p, mask=m_n & (o_k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _step(
    acc, acc2, squares, b_w, b_w2, p_x, p_g, o_k, K, EVEN_K: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """Adds what columns o_k contribute to the sums over the rows of one weight or two, and to the row's own squares."""
    if EVEN_K:
        b_x = tl.load(p_x + o_k).to(tl.float32)
    else:
        b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    if p_g is not None:
        squares += b_x * b_x
        b_x *= tl.load(p_g + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    acc += b_w.to(tl.float32) * b_x[None, :]
    if PAIR:
        acc2 += b_w2.to(tl.float32) * b_x[None, :]
    return acc, acc2, squares


@triton.jit
def _row_sums(
    p_x, p_g, p_w, p_w2, o_n, N, K, stride_wn, stride_wn2, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PAIR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The rows o_n of one weight, and with PAIR of another, times the row."""
    o_k = tl.arange(0, BLOCK_K)
    m_n = (o_n < N)[:, None]
    at = tl.minimum(o_n, N - 1).to(tl.int64)[:, None]
    p = p_w + at * stride_wn + o_k[None, :]
    p2 = p_w2 + at * stride_wn2 + o_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc2 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    first = 0
    if EARLY:
        b_w = _tile(p, o_k, m_n, K, EVEN_K)
        b_w2 = _tile(p2, o_k, m_n, K, EVEN_K) if PAIR else b_w
        gdc_launch_dependents()
        gdc_wait()
        acc, acc2, squares = _step(acc, acc2, squares, b_w, b_w2, p_x, p_g, o_k, K, EVEN_K, PAIR)
        first = BLOCK_K
    for k in range(first, K, BLOCK_K):
        b_w = _tile(p + k, k + o_k, m_n, K, EVEN_K)
        b_w2 = _tile(p2 + k, k + o_k, m_n, K, EVEN_K) if PAIR else b_w
        acc, acc2, squares = _step(acc, acc2, squares, b_w, b_w2, p_x, p_g, k + o_k, K, EVEN_K, PAIR)
    total, total2 = tl.sum(acc, 1), tl.sum(acc2, 1)
    if p_g is not None:
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / K + eps)
        total *= scale
        total2 *= scale
    return total, total2


@triton.jit
def _activated(x, GATE: tl.constexpr):
    if GATE == "silu":
        return x / (1.0 + tl.exp(-x))
    elif GATE == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(GATE == "gelu_tanh")
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 · (1 + tanh(u)) is 1 / (1 + exp(−2u))


@triton.jit
def _rows(
    p_x, p_g, p_w, p_out, p_added, p_w2, i, N, K, stride_wn, stride_wn2, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, GATE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    total, total2 = _row_sums(
        p_x, p_g, p_w, p_w2, o_n, N, K, stride_wn, stride_wn2, eps, BLOCK_N, BLOCK_K, EVEN_K, GATE != "", EARLY
    )
    if GATE != "":
        total = _activated(total, GATE) * total2
    if p_added is not None:
        total += tl.load(p_added + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    tl.store(p_out + o_n, total.to(p_out.dtype.element_ty), mask=o_n < N)


@triton.jit
def _row_product_kernel(
    p_x, p_g, p_w, p_out, p_added, N, stride_wn, p_w2, p_out2, N2, stride_wn2, K, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TWO: tl.constexpr, GATE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: the row blocks of the first weight, then (TWO) those of the second.

    p_g: the weight of an RMS norm of the row, or None. p_added: a row added to the result, or None.
    """
    i = tl.program_id(0)
    if TWO:
        n_first = tl.cdiv(N, BLOCK_N)
        if i < n_first:
            _rows(
                p_x,
                p_g,
                p_w,
                p_out,
                p_added,
                p_w,
                i,
                N,
                K,
                stride_wn,
                stride_wn,
                eps,
                BLOCK_N,
                BLOCK_K,
                EVEN_K,
                GATE,
                EARLY,
            )
        else:
            _rows(
                p_x, p_g, p_w2, p_out2, p_added, p_w2, i - n_first, N2, K, stride_wn2, stride_wn2, eps,
                BLOCK_N, BLOCK_K, EVEN_K, GATE, EARLY,
            )  # fmt: skip
    else:
        _rows(
            p_x,
            p_g,
            p_w,
            p_out,
            p_added,
            p_w2,
            i,
            N,
            K,
            stride_wn,
            stride_wn2,
            eps,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            GATE,
            EARLY,
        )
