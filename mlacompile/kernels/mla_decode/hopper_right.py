"""The partition of ``hopper.py`` that has the columns of the output beyond the left ones, and their queries."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_rows import _clear_dead, _queries, _rescaled, _shrunk, _slot, _store_columns


@gluon.jit
def _right(x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B, i_tile,
           n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
           R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr,
           BLOCK_P: gl.constexpr, ONE_QUERY: gl.constexpr, SHRINK: gl.constexpr,
           FACTORED: gl.constexpr):  # fmt: skip
    """The columns beyond LEFT, as two quarters: the second is multiplied while the next softmax is computed.

    FACTORED: as for ``_left``. There are no registers then to hold P, and either product reads it.
    """
    HELD: gl.constexpr = not FACTORED
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, QUARTER, 16]
    )
    o_row: gl.constexpr = gl.SliceLayout(1, layout)
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, _end, t, n, skip, rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        # The P of the previous item's last block was waited for, and it follows the last use of that item's queries.
        p = p_q + row.to(gl.int64) * stride_qb
        first = _queries(p, i_tile, H, S, stride_qh, stride_qs, stride_qr, LEFT, QUARTER, R, ONE_QUERY)
        last = _queries(p, i_tile, H, S, stride_qh, stride_qs, stride_qr, LEFT + QUARTER, QUARTER, R, ONE_QUERY)
        if BLOCK_P > 0:
            p = p_qpe + row.to(gl.int64) * stride_pb
            rope = _queries(p, i_tile, H, S, stride_ph, stride_ps, stride_pr, 0, BLOCK_P, P, ONE_QUERY)
            x.q_pe.store(rope)
        x.q_right.index(0).store(_shrunk(first, x.p.dtype, SHRINK))
        x.q_right.index(1).store(_shrunk(last, x.p.dtype, SHRINK))
        fence_async_shared()
        mbarrier.arrive(bar.queries, count=1)

        o1 = gl.zeros((ROWS, QUARTER), gl.float32, layout)
        o2 = gl.zeros((ROWS, QUARTER), gl.float32, layout)
        for _ in range(n):
            stage = g & 1
            phase = (g >> 1) & 1
            mbarrier.wait(bar.alpha.index(stage), phase)
            o1, o2 = _rescaled(x.alpha.index(stage), x.alpha.index(stage).load(o_row), o1, o2, True, not FACTORED)
            mbarrier.wait(bar.first_full.index(stage), phase)
            mbarrier.wait(bar.last_full.index(stage), phase)
            mbarrier.wait(bar.p_full, g & 1)
            if (t < lo) | (t + BLOCK > hi):
                _clear_dead(x.right.index(2 * stage), t, lo, hi, QUARTER, PANEL)
                _clear_dead(x.right.index(2 * stage + 1), t, lo, hi, QUARTER, PANEL)
            a_p = x.p
            if HELD:
                a_p = x.p.load(gl.DotOperandLayout(0, layout, 2))
                mbarrier.arrive(bar.p_empty, count=1)
            o1 = warpgroup_mma(a_p, x.right.index(2 * stage), o1, is_async=True)
            o1 = warpgroup_mma_wait(0, deps=(o1,))
            mbarrier.arrive(bar.first_empty.index(stage), count=1)
            mbarrier.wait(bar.scores.index(stage), phase)
            o2 = warpgroup_mma(a_p, x.right.index(2 * stage + 1), o2, is_async=True)
            o2 = warpgroup_mma_wait(0, deps=(o2,))
            if not HELD:
                mbarrier.arrive(bar.p_empty, count=1)
            mbarrier.arrive(bar.last_empty.index(stage), count=1)
            t += BLOCK
            g += 1

        mbarrier.wait(bar.total, item & 1)
        total = x.total.load(o_row)
        whole = (skip == 0) & (rest == 0)
        slot = _slot(part, skip)
        _store_columns(
            o1, total, x.q_right.index(0), p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, LEFT, QUARTER, R,
            ONE_QUERY,
        )  # fmt: skip
        _store_columns(
            o2, total, x.q_right.index(1), p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, LEFT + QUARTER,
            QUARTER, R, ONE_QUERY,
        )  # fmt: skip
        item += 1
        todo -= taken
        row += 1
        position = 0
