"""Triton kernel of ``fp8_experts``: rows of one expert at a time, as ``fp8_linear/tiles.py`` multiplies rows.

    program:  BLOCK_N rows of one expert's weight × up to BLOCK_M rows of x that are its own, K in steps of 128

Rows of x are gathered where they are, in the order of their experts, and their results go where they belong. A program
finds its expert by itself: tiles of rows are counted expert by expert, from where the rows of each begin. With few rows
an expert the time is that of reading the weights of those that have any: each is read once.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mlacompile.kernels.fp8_linear.tiles import _widened


@triton.jit
def _rows_of_tile(p_starts, i, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tile i: its expert, E if there are fewer tiles, its first row, and the end of the expert's rows."""
    o_e = tl.arange(0, EXPERTS)
    begins = tl.load(p_starts + o_e, mask=o_e < E, other=0)
    ends = tl.load(p_starts + o_e + 1, mask=o_e < E, other=0)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(tiles, 0) <= i  # experts all of whose tiles come before
    e = tl.sum((before & (o_e < E)).to(tl.int32), 0)
    mine = o_e == e
    first = tl.sum(tl.where(mine, begins, 0), 0) + (i - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK_M
    return e, first, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit
def _fp8_experts_kernel(
    p_x, p_x_descale, d_w, p_descale, p_order, p_starts, p_out, N, K, E,
    stride_xm, stride_xsm, stride_xsk, stride_se, stride_sn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXPERTS: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of weight rows, tiles of rows, as many as there can be). p_x: e4m3 as bytes. d_w: descriptor of
    [E, N, K]. p_order: rows in the order of their experts, those of expert e from p_starts[e] on. EXPERTS: E rounded up
    to a power of two. EXACT: products are summed in all bits of float32."""
    i_n = tl.program_id(0)
    e, first, end = _rows_of_tile(p_starts, tl.program_id(1), E, EXPERTS, BLOCK_M)
    if e < E:
        o_m = first + tl.arange(0, BLOCK_M)
        there = o_m < end
        o_row = tl.load(p_order + o_m, mask=there, other=0).to(tl.int64)
        o_k = tl.arange(0, 128)
        p_row = p_x + o_row[:, None] * stride_xm + o_k[None, :]
        p_row_descale = p_x_descale + o_row * stride_xsm
        p_block_descale = p_descale + e.to(tl.int64) * stride_se + i_n * BLOCK_N // 128 * stride_sn
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in tl.range(0, K, 128, num_stages=STAGES):
            b_w = d_w.load([e, i_n * BLOCK_N, k]).reshape(BLOCK_N, 128)
            b_x = tl.load(p_row + k, mask=there[:, None] & (k + o_k < K)[None, :], other=0)
            b_x = b_x.to(tl.float8e4nv, bitcast=True)
            x_descale = tl.load(p_row_descale + k // 128 * stride_xsk, mask=there, other=0.0)
            factor = tl.load(p_block_descale + k // 128) * x_descale
            if EXACT:
                product = tl.dot(_widened(b_w, tl.float16), _widened(b_x, tl.float16).T)
            else:
                product = tl.dot(b_w, b_x.T)
            acc += product * factor[None, :]
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        p_to = p_out + o_row[None, :] * N + o_n[:, None]
        tl.store(p_to, acc.to(p_out.dtype.element_ty), mask=(o_n < N)[:, None] & there[None, :])
