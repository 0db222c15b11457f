"""The Triton kernel of ``quantize_rows``: a program has some groups of 128 values of a row, or all of a row to norm.

Where the root of a norm is left to the product, a program has some groups there, too, and stores the sum of their
squares.

Values stay in registers from the first load to the last store, as [groups, 128]: the sum of squares is over all of
them, the largest value of a group over its 128.

Where kernels are chained, this one is launched while the one before it ends, and the next one, a product, as soon as
all programs of this one have begun.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mlacompile.kernels.drop import _drop
from mlacompile.kernels.parts import _add_parts
from mlacompile.kernels.row_product.portable import _activated

_SMALLEST = tl.constexpr(2.0**-126)
_LARGEST = tl.constexpr(448.0)


@triton.jit
def _quantize_rows_kernel(
    p_x, p_added, p_norm, p_gated, p_q, p_descale, p_total, p_squares, p_beside, K, BESIDE, eps, stride_xp,
    stride_xm, stride_xg, stride_am, stride_gm, PARTS: tl.constexpr, SUM: tl.constexpr, GROUPS: tl.constexpr,
    GATE: tl.constexpr, PDL: tl.constexpr, p_done, done_lines, SPENT: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, ⌈groups of a row / GROUPS⌉, and as many of what is beside). stride_xg: from one group of x to the
    next. Where there is a norm and no p_squares, one program has all groups of a row. PARTS: in float32 that x is the
    sum of, stride_xp apart, if there is more than one; SUM: what that is rounded to, or None. p_beside: of the sum of
    BESIDE columns more, or None. SPENT, p_done: what is dropped, with K a multiple of 128 then.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    blocks = tl.cdiv(K, GROUPS * 128)
    if block < blocks:
        _quantize_groups(
            p_x + row * stride_xm, p_added, p_norm, p_gated, p_q, p_descale, p_total, p_squares, row, block, blocks, K,
            eps, stride_xp, stride_xg, stride_am, stride_gm, PARTS, SUM, GROUPS, GATE, SPENT, THREADS,
        )  # fmt: skip
    elif p_beside is not None:
        _add_parts(
            p_x + row * stride_xm + K, stride_xp, p_beside + row * BESIDE, block - blocks, BESIDE, PARTS, GROUPS * 128,
            SPENT, THREADS,
        )  # fmt: skip
    if p_done is not None:
        _drop_share(p_done, done_lines, THREADS)


@triton.jit
def _quantize_groups(
    p_row, p_added, p_norm, p_gated, p_q, p_descale, p_total, p_squares, row, block, blocks, K, eps, stride_xp,
    stride_xg, stride_am, stride_gm, PARTS: tl.constexpr, SUM: tl.constexpr, GROUPS: tl.constexpr, GATE: tl.constexpr,
    SPENT: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Block number block, of blocks, of a row, which x has at p_row."""
    o_g = block * GROUPS + tl.arange(0, GROUPS)
    o_c = tl.arange(0, 128)
    o = o_g[:, None] * 128 + o_c[None, :]
    mask = o < K
    p_x = p_row + o_g[:, None] * stride_xg + o_c[None, :]
    x = tl.load(p_x, mask=mask, other=0.0)
    if p_norm is not None:  # here, so that nothing is waited for behind the sum over a row
        norm = tl.load(p_norm + o, mask=mask, other=0.0)
    for i in tl.static_range(1, PARTS):
        x += tl.load(p_x + i * stride_xp, mask=mask, other=0.0)
    if SUM is not None:
        x = x.to(SUM)
    if p_added is not None:
        x += tl.load(p_added + row * stride_am + o, mask=mask, other=0.0)
        tl.store(p_total + row * K + o, x, mask=mask)
    y = x.to(tl.float32)
    if p_norm is not None:
        squares = tl.sum(tl.sum(y * y, 1), 0)
        if p_squares is not None:
            tl.store(p_squares + row * blocks + block, squares)
        else:
            y = y * tl.rsqrt(squares / K + eps)
        y = y * norm.to(tl.float32)
    if p_gated is not None:
        y = _activated(y, GATE) * tl.load(p_gated + row * stride_gm + o, mask=mask, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(y), 1)
    descale = tl.where(peak == 0, 1.0, tl.maximum(tl.div_rn(peak, _LARGEST), _SMALLEST))
    odd = tl.max(((y != y) | (tl.abs(y) == float("inf"))).to(tl.int32), 1)
    descale = tl.where(odd > 0, float("nan"), descale)
    # One division a group. Values that lie within 2^-22 of the middle between two of FP8 may go to the other.
    q = y * tl.div_rn(tl.full((GROUPS,), 1.0, tl.float32), descale)[:, None]
    q = tl.minimum(tl.maximum(q, -_LARGEST), _LARGEST)
    tl.store(p_q + row * K + o, q.to(p_q.dtype.element_ty), mask=mask)
    groups = tl.cdiv(K, 128)
    tl.store(p_descale + row * groups + o_g, descale, mask=o_g < groups)
    if SPENT:
        tl.debug_barrier()  # all warps have what they loaded
        _drop_groups(p_row, block, stride_xp, stride_xg, groups, PARTS, GROUPS, THREADS)
        if p_gated is not None:
            _drop_groups(p_gated + row * stride_gm, block, 0, 128, groups, 1, GROUPS, THREADS)


@triton.jit
def _drop_groups(p_row, block, stride_p, stride_g, groups, PARTS: tl.constexpr, GROUPS: tl.constexpr,
                 THREADS: tl.constexpr):  # fmt: skip
    """Drop the program's groups of 128 values of a row, of each part, a line a thread."""
    LINES: tl.constexpr = p_row.dtype.element_ty.primitive_bitwidth // 8  # of a group
    for first in tl.static_range(0, PARTS * GROUPS * LINES, THREADS):
        i = first + tl.arange(0, THREADS)
        part, group = i // (GROUPS * LINES), block * GROUPS + i // LINES % GROUPS
        p = p_row + part.to(tl.int64) * stride_p + group * stride_g + i % LINES * (128 // LINES)
        _drop(p, (part < PARTS) & (group < groups))


@triton.jit
def _drop_share(p_done, lines, THREADS: tl.constexpr):
    """Drop the program's share of so many lines."""
    programs = tl.num_programs(0) * tl.num_programs(1)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    VALUES: tl.constexpr = 1024 // p_done.dtype.element_ty.primitive_bitwidth  # of a line
    for first in tl.range(program * THREADS, lines, programs * THREADS):
        line = first + tl.arange(0, THREADS)
        _drop(p_done + line.to(tl.int64) * VALUES, line < lines)
