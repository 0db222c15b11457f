"""Combines what several programs of the Hopper kernel computed of one row: a softmax-weighted sum of their partials.

The main kernel lists for every batch row the first part that worked on it and how many did. Most rows are usually whole
and already written: their programs end at once.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _mla_merge_kernel(
    p_part, p_part_lse, p_parts, p_out, p_lse, H, S, n_rows_padded,
    R: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (batch, groups of rows, column chunks). Partials: [slots, n_rows_padded, R], their log-sum-exps in base 2.

    Of n parts, beginning with part i, the first lies in slot 2 * i + 1 and each other part j in slot 2 * j.
    """
    i_b = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.load(p_parts + 2 * i_b)
    count = tl.load(p_parts + 2 * i_b + 1)
    if count > 1:
        o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        for row in range(tl.program_id(1) * ROWS, H * S, tl.num_programs(1) * ROWS):
            o_row = row + tl.arange(0, ROWS)
            m_row = o_row < H * S
            acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
            peak = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            for i in range(0, count, SLOTS):
                o_part = i + tl.arange(0, SLOTS)
                slot = 2 * (first + o_part) + (o_part == 0).to(tl.int32)
                o_in = slot.to(tl.int64)[:, None] * n_rows_padded + o_row[None, :]
                mask = (o_part < count)[:, None] & m_row[None, :]
                lse = tl.load(p_part_lse + o_in, mask=mask, other=float("-inf"))
                p = p_part + o_in[:, :, None] * R + o_c[None, None, :]
                part = tl.load(p, mask=mask[:, :, None] & (o_c < R)[None, None, :], other=0.0).to(tl.float32)
                higher = tl.maximum(peak, tl.max(lse, 0))
                use = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
                weight = tl.exp2(lse - use[None, :])
                shrink = tl.exp2(peak - use)
                acc = acc * shrink[:, None] + tl.sum(part * weight[:, :, None], 0)
                total = total * shrink + tl.sum(weight, 0)
                peak = higher
            out = acc / tl.where(total == 0, 1.0, total)[:, None]
            o_out = (i_b.to(tl.int64) * H + o_row % H) * S + o_row // H
            mask = m_row[:, None] & (o_c < R)[None, :]
            tl.store(p_out + o_out[:, None] * R + o_c[None, :], out.to(p_out.dtype.element_ty), mask=mask)
            if tl.program_id(2) == 0:
                tl.store(p_lse + o_out, (peak + tl.log2(total)) * LN2, mask=m_row)
