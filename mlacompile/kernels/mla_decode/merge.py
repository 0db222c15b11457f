"""Combines what several programs of the Hopper kernel computed of one row: a softmax-weighted sum of their partials.

The main kernel lists for every batch row the first part that worked on it and how many did. Most rows are usually whole
and already written: their programs end at once. A thread sums the same columns of several partials, so that little or
nothing of a sum crosses threads: layouts that Triton chooses take several times the instructions.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlacompile.kernels.hopper import _drop, _here, _launch_later, _wait_for_earlier, all_warps

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _mla_merge_kernel(
    p_part, p_part_lse, p_parts, p_out, p_lse, H, S, n_rows_padded, n_parts,
    R: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr, BLOCK_C: gl.constexpr, WIDE: gl.constexpr,
    ALONE: gl.constexpr, DROP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (batch, groups of rows, column chunks). Partials: [slots, n_rows_padded, R], their log-sum-exps in base 2.

    Of n parts, beginning with part i, the first lies in slot 2 * i + 1 and each other part j in slot 2 * j. ROWS and
    SLOTS: so many are looked at together. WIDE: warps that divide the columns among them; the others divide rows.
    ALONE: there is one batch row, which begins with part 0. Partials are then sent for before it is known how many of
    n_parts there are, and what nobody wrote is left out. DROP: partials are whole lines, and dropped.
    """
    lanes: gl.constexpr = min(BLOCK_C // WIDE // 8, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // lanes, lanes], [num_warps // WIDE, 1, WIDE], [2, 1, 0])
    by_slot: gl.constexpr = gl.SliceLayout(2, layout)
    by_column: gl.constexpr = gl.SliceLayout(1, layout)
    by_row: gl.constexpr = gl.SliceLayout(1, by_slot)
    i_b = gl.program_id(0)
    _launch_later()  # a kernel that waits, as ours does, may prepare itself meanwhile
    _wait_for_earlier()
    first = 0
    count = gl.to_tensor(1)
    if not ALONE:
        first = gl.load(p_parts + 2 * i_b)
        count = gl.load(p_parts + 2 * i_b + 1)
    if ALONE or count > 1:
        o_c = gl.program_id(2) * BLOCK_C + gl.arange(0, BLOCK_C, gl.SliceLayout(0, by_column))
        o_slot = gl.arange(0, SLOTS, gl.SliceLayout(0, by_slot))
        for row in range(gl.program_id(1) * ROWS, H * S, gl.num_programs(1) * ROWS):
            o_row = row + gl.arange(0, ROWS, by_row)
            m_row = o_row < H * S
            acc = gl.zeros((ROWS, BLOCK_C), gl.float32, by_column)
            peak = gl.full((ROWS,), float("-inf"), gl.float32, by_row)
            total = gl.zeros((ROWS,), gl.float32, by_row)
            i = gl.to_tensor(0)
            while i < count:
                o_part = i + o_slot
                slot = 2 * (first + o_part) + gl.where(o_part == 0, 1, 0)
                # 32 bits do: tiles and parts are no more than fill a GPU.
                o_in = slot[None, :] * n_rows_padded + o_row[:, None]
                mask = (o_part < (n_parts if ALONE else count))[None, :] & m_row[:, None]
                lse = gl.load(p_part_lse + o_in, mask=mask, other=float("-inf"))
                p = p_part + gl.expand_dims(o_in * R, 2) + gl.expand_dims(o_c[None, :], 1)
                m_c = gl.expand_dims((o_c < R)[None, :], 1)
                part = gl.load(p, mask=gl.expand_dims(mask, 2) & m_c, other=0.0)
                # Always so, but the compiler does not know, which would ask for the number first, and wait for it.
                if not ALONE or _here(H) > 0:
                    seen = part.to(gl.float32)
                    if ALONE:
                        count = gl.load(p_parts + 1)
                        there = (o_part < count)[None, :] & m_row[:, None]
                        lse = gl.where(there, lse, float("-inf"))
                        seen = gl.where(gl.expand_dims(there, 2), seen, 0.0)
                    higher = gl.maximum(peak, gl.max(lse, 1))
                    use = gl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
                    weight = gl.exp2(lse - use[:, None])
                    shrink = gl.exp2(peak - use)
                    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, by_column))[:, None]
                    acc += gl.sum(seen * gl.expand_dims(weight, 2), 1)
                    total = total * shrink + gl.sum(weight, 1)
                    peak = higher
                i += SLOTS
            o_out = (i_b.to(gl.int64) * H + o_row % H) * S + o_row // H
            share = 1.0 / gl.where(total == 0, 1.0, total)
            by_out: gl.constexpr = gl.SliceLayout(1, by_column)
            out = acc * gl.convert_layout(share, by_out)[:, None]
            p_to = p_out + gl.convert_layout(o_out * R, by_out)[:, None] + o_c[None, :]
            m_row = m_row & (count > 1)
            mask = gl.convert_layout(m_row, by_out)[:, None] & (o_c < R)[None, :]
            gl.store(p_to, out.to(p_out.dtype.element_ty), mask=mask)
            if gl.program_id(2) == 0:
                gl.store(p_lse + o_out, (peak + gl.log2(total)) * LN2, mask=m_row)
            if DROP:
                all_warps()  # have what they loaded
                _drop_partials(p_part, first, count, row, H * S, n_rows_padded, R, ROWS, SLOTS, BLOCK_C, num_warps)


@gluon.jit
def _drop_partials(p_part, first, count, row, n_rows, n_rows_padded, R: gl.constexpr, ROWS: gl.constexpr,
                   SLOTS: gl.constexpr, BLOCK_C: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Drop what the program has read of rows from that one on: a line a thread."""
    VALUES: gl.constexpr = 1024 // p_part.dtype.element_ty.primitive_bitwidth  # of a line
    LINES: gl.constexpr = BLOCK_C // VALUES
    o = gl.arange(0, ROWS * SLOTS * LINES, gl.BlockedLayout([1], [32], [WARPS], [0]))
    o_c = gl.program_id(2) * BLOCK_C + o % LINES * VALUES
    o_row = row + o // (SLOTS * LINES)
    for i in range(0, count, SLOTS):
        part = i + o // LINES % SLOTS
        slot = 2 * (first + part) + gl.where(part == 0, 1, 0)
        _drop(p_part + ((slot * n_rows_padded + o_row) * R + o_c), (part < count) & (o_row < n_rows) & (o_c < R))
