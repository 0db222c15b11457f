"""The Gluon kernel of ``mla_decode`` for compute capability 9.0: TMA, asynchronous wgmma, three specialized partitions.

One program owns an SM. A tile has 64 rows (query, head); its float32 output, 64 x 512, fills half of the registers, so
two groups of four warps share it, and one more warp fetches the cache:

    _fetch   cache rows, contiguous or by pages, into two stages of shared memory, each in three parts
    _left    all scores, the softmax, and output columns [0, LEFT) with P from registers
    _right   the other columns, as two quarters, with P through shared memory

A block of 64 tokens is loaded once and serves as key and as value. The parts of a stage have barriers of their own, in
the order in which they fall free: the first quarter with the rotary keys, the left half, the last quarter. ``_left``
issues the product with V of block n before the scores of block n + 1, so that reloading hides behind both; ``_right``
multiplies its last quarter while ``_left`` computes the softmax. Barriers whose two sides can be two blocks apart are
double. Where several tiles share a cache, so that memory is not what is waited for, the left half is two parts
(HALVES): the second is multiplied behind the scores of block n + 1, under its softmax, when tensor cores had little to
do.

Memory and barriers are those of ``hopper_room.py``, ``_fetch`` is in ``hopper_fetch.py``, ``_right`` in
``hopper_right.py``, and what both halves do with
their rows in ``hopper_rows.py``. ``hopper_plan.py`` says which blocks of which rows a program works on. A row that ends
up in several programs leaves normalized partials in the dtype of the cache (they are averages of it, so they fit),
which ``merge.py`` combines.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlacompile.kernels.hopper import _launch_later, _wait_for_earlier
from mlacompile.kernels.mla_decode.hopper_fetch import _fetch
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item, _plan
from mlacompile.kernels.mla_decode.hopper_right import _right
from mlacompile.kernels.mla_decode.hopper_room import ROWS, Parts, _setup
from mlacompile.kernels.mla_decode.hopper_rows import (
    _clear_dead,
    _computed,
    _count,
    _factors,
    _limits,
    _queries,
    _rescaled,
    _rope_scores,
    _rows,
    _shrunk,
    _slot,
    _softmax,
    _store_columns,
    _weights,
)

LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.3e38)  # a finite start of the running maximum: -inf - -inf would be NaN


@gluon.jit
def _first_scores(x, bar, s0, stage, phase, BLOCK_P: gl.constexpr, FACTORED: gl.constexpr):
    """Begins the scores of a stage's first quarter and rotary keys, which may be a sum of their own."""
    mbarrier.wait(bar.first_full.index(stage), phase)
    keys = x.right.index(2 * stage).permute((1, 0))
    s = warpgroup_mma(x.q_right.index(0), keys, s0, use_acc=False, is_async=True)
    s_pe = s0
    if BLOCK_P > 0:
        s, s_pe = _rope_scores(x.q_pe, x.pe.index(stage), s, s0, FACTORED)
    return s, s_pe


@gluon.jit
def _other_scores(x, bar, s, stage, phase, SOONER: gl.constexpr, HALVES: gl.constexpr):
    """Adds the scores of all columns of a stage but its first quarter, in the order in which they arrive."""
    mbarrier.wait(bar.left_full.index(stage), phase)
    keys = x.left.index(stage).slice(0, SOONER, dim=1).permute((1, 0))
    s = warpgroup_mma(x.q_left.slice(0, SOONER, dim=1), keys, s, is_async=True)
    mbarrier.wait(bar.last_full.index(stage), phase)
    s = warpgroup_mma(x.q_right.index(1), x.right.index(2 * stage + 1).permute((1, 0)), s, is_async=True)
    if HALVES:
        mbarrier.wait(bar.late_full.index(stage), phase)
        keys = x.left.index(stage).slice(SOONER, SOONER, dim=1).permute((1, 0))
        s = warpgroup_mma(x.q_left.slice(SOONER, SOONER, dim=1), keys, s, is_async=True)
    return s


@gluon.jit
def _add_left(x, a_p, o, stage, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Begins to add a block's products of P and some of its left columns."""
    return warpgroup_mma(a_p, x.left.index(stage).slice(FIRST, WIDTH, dim=1), o, is_async=True)


@gluon.jit
def _store_p(x, p, IN_PLACE: gl.constexpr):
    """P for ``_right``. IN_PLACE: which multiplies it where it lies, and does not load it."""
    x.p.store(p)
    if IN_PLACE:
        fence_async_shared()


@gluon.jit
def _settled(bar, o_late, stage):
    """The second half of the left columns, when a block has been added to it."""
    o_late = warpgroup_mma_wait(0, deps=(o_late,))
    mbarrier.arrive(bar.late_empty.index(stage), count=1)
    return o_late


@gluon.jit
def _store_left(x, o, o_late, m, total, divisor, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, skip, rest,
                share, i_tile, n_tiles, H, S, R: gl.constexpr, LEFT: gl.constexpr, SOONER: gl.constexpr,
                ONE_QUERY: gl.constexpr, s_row: gl.constexpr):  # fmt: skip
    """The left columns of an item's output, its log-sum-exps, and the parts of its row."""
    whole = (skip == 0) & (rest == 0)
    slot = _slot(part, skip)
    total_o = gl.convert_layout(divisor, gl.SliceLayout(1, o.type.layout))
    through = x.q_left._reinterpret(x.p.dtype, [LEFT // SOONER, ROWS, SOONER], x.q_left.layout)
    _store_columns(
        o, total_o, through.index(0), p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, 0, SOONER, R, ONE_QUERY
    )
    if SOONER < LEFT:
        _store_columns(
            o_late, total_o, through.index(1), p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, SOONER, SOONER,
            R, ONE_QUERY,
        )  # fmt: skip
    r_row, r_h, r_s = _rows(i_tile, H, ONE_QUERY, s_row)
    lse = gl.where(total == 0, float("-inf"), m + gl.log2(total))
    if whole:
        o_lse = (row.to(gl.int64) * H + r_h) * S + r_s
        gl.store(p_lse + o_lse, lse * LN2, mask=r_row < _count(H, S, ONE_QUERY))
    else:
        gl.store(p_part_lse + slot * n_tiles * ROWS + r_row, lse, mask=r_row < _count(H, S, ONE_QUERY))
    if (skip == 0) & (i_tile == 0):
        gl.store(p_parts + 2 * row, part)
        gl.store(p_parts + 2 * row + 1, 1 + (rest + share - 1) // share)


@gluon.jit
def _left(x, bar, p_q, p_start, p_length, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, position, share,
          overhead, B, i_tile, n_tiles, scale_log2, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr,
          R: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr, BLOCK_P: gl.constexpr,
          CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr, WIDEST: gl.constexpr, factors, FACTORED: gl.constexpr,
          SHRINK: gl.constexpr, HALVES: gl.constexpr):  # fmt: skip
    """Scores and softmax of every block, and the left columns of the output.

    WIDEST: columns of one wgmma. factors: if FACTORED [2, 64], what the latents of a stage, times queries that are
    SHRINK of what they were, are still to be multiplied with. HALVES: the second half of the left columns, o_late, is
    multiplied behind the scores of the next block. Where no factors are, earlier output is multiplied only
    where some row moved.
    """
    SELDOM: gl.constexpr = not FACTORED
    SOONER: gl.constexpr = LEFT // 2 if HALVES else LEFT
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(SOONER, WIDEST), 16]
    )
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = x.p.dtype
    s0 = gl.zeros((ROWS, BLOCK), gl.float32, s_layout)
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, end, t, n, skip, rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        limit, sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, s_row)

        p = p_q + row.to(gl.int64) * stride_qb
        q = _queries(p, i_tile, H, S, stride_qh, stride_qs, stride_qr, 0, LEFT, R, ONE_QUERY)
        x.q_left.store(_shrunk(q, dtype, SHRINK))
        fence_async_shared()
        o = gl.zeros((ROWS, SOONER), gl.float32, o_layout)
        o_late = gl.to_tensor(0.0)
        if HALVES:
            o_late = gl.zeros((ROWS, SOONER), gl.float32, o_layout)
        m = gl.full((ROWS,), LOWEST, gl.float32, s_row)
        unit = gl.to_tensor(0.0)

        # The first block: nothing to overlap with yet.
        stage = g & 1
        phase = (g >> 1) & 1
        mbarrier.wait(bar.queries, item & 1)
        s, s_pe = _first_scores(x, bar, s0, stage, phase, BLOCK_P, FACTORED)
        s = _other_scores(x, bar, s, stage, phase, SOONER, HALVES)
        factor, unit = _factors(factors.index(stage), unit, t, lo, hi, FACTORED, s_layout)
        s = _computed(s, s_pe, factor, FACTORED, BLOCK_P, 0)
        s, m, alpha = _softmax(s, m, t, lo, hi, sure, limit, scale_log2, CAUSAL, s_layout, SELDOM)
        x.alpha.index(stage).store(alpha)
        mbarrier.arrive(bar.alpha.index(stage), count=1)
        e = gl.exp2(s * scale_log2 - m[:, None])
        total = gl.sum(e, 1)
        b_p = _weights(e, factor, unit, dtype, FACTORED)
        _store_p(x, b_p, FACTORED)
        mbarrier.arrive(bar.p_full, count=1)
        a_p = gl.convert_layout(b_p, p_layout)

        for _ in range(n - 1):
            stage = g & 1
            other = stage ^ 1
            phase = ((g + 1) >> 1) & 1
            if (t < lo) | (t + BLOCK > hi):
                _clear_dead(x.left.index(stage), t, lo, hi, LEFT, PANEL)
            o = _add_left(x, a_p, o, stage, 0, SOONER)
            s, s_pe = _first_scores(x, bar, s0, other, phase, BLOCK_P, FACTORED)
            o = warpgroup_mma_wait(2 if BLOCK_P > 0 else 1, deps=(o,))
            mbarrier.arrive(bar.left_empty.index(stage), count=1)
            s = _other_scores(x, bar, s, other, phase, SOONER, HALVES)
            if HALVES:
                o_late = _add_left(x, a_p, o_late, stage, SOONER, SOONER)
            t += BLOCK
            factor, new_unit = _factors(factors.index(other), unit, t, lo, hi, FACTORED, s_layout)
            s = _computed(s, s_pe, factor, FACTORED, BLOCK_P, 1 if HALVES else 0)
            mbarrier.arrive(bar.scores.index(stage), count=1)
            s, m, alpha = _softmax(s, m, t, lo, hi, sure, limit, scale_log2, CAUSAL, s_layout, SELDOM)
            total = total * alpha
            if FACTORED:
                alpha = alpha * (unit / new_unit)
                unit = new_unit
            x.alpha.index(other).store(alpha)
            mbarrier.arrive(bar.alpha.index(other), count=1)
            e = gl.exp2(s * scale_log2 - m[:, None])
            b_p = _weights(e, factor, unit, dtype, FACTORED)
            mbarrier.wait(bar.p_empty, g & 1)
            if HALVES and not ONE_QUERY:  # sooner than need be: several queries leave no registers for one under way
                o_late = _settled(bar, o_late, stage)
            _store_p(x, b_p, FACTORED)
            mbarrier.arrive(bar.p_full, count=1)
            # From here on _right works too.
            if HALVES and ONE_QUERY:
                o_late = _settled(bar, o_late, stage)
            o, o_late = _rescaled(x.alpha.index(other), gl.convert_layout(alpha, o_row), o, o_late, HALVES, SELDOM)
            a_p = gl.convert_layout(b_p, p_layout)
            total += gl.sum(e, 1)
            g += 1

        # The last block: no scores follow.
        if (row + 1 >= B) | (todo - taken <= overhead):
            _launch_later()
        stage = g & 1
        mbarrier.arrive(bar.scores.index(stage), count=1)
        if (t < lo) | (t + BLOCK > hi):
            _clear_dead(x.left.index(stage), t, lo, hi, LEFT, PANEL)
        o = _add_left(x, a_p, o, stage, 0, SOONER)
        if HALVES:
            o_late = _add_left(x, a_p, o_late, stage, SOONER, SOONER)
        # What the output is divided by, as it is held.
        divisor = total
        if FACTORED:
            divisor = total / (unit * SHRINK)
        x.total.store(divisor)
        mbarrier.arrive(bar.total, count=1)
        o = warpgroup_mma_wait(0, deps=(o,))
        if HALVES:
            o_late = _settled(bar, o_late, stage)
        mbarrier.arrive(bar.left_empty.index(stage), count=1)

        _store_left(
            x, o, o_late, m, total, divisor, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, skip, rest, share,
            i_tile, n_tiles, H, S, R, LEFT, SOONER, ONE_QUERY, s_row,
        )  # fmt: skip
        mbarrier.wait(bar.p_empty, g & 1)
        g += 1
        item += 1
        todo -= taken
        row += 1
        position = 0


@gluon.jit(do_not_specialize=["B", "T", "n_tiles", "n_pages", "n_columns", "stride_table", "min_share", "overhead"])
def _mla_decode_hopper_kernel(
    d_c, d_pe, p_q, p_qpe, p_start, p_length, p_table, p_out, p_lse, p_part, p_part_lse, p_parts,
    scale_log2, B, H, S, T, n_tiles, apart_c, apart_pe, n_pages, stride_table, n_columns, min_share, overhead,
    stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
    R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr,
    BLOCK_P: gl.constexpr, PAGE: gl.constexpr, CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr,
    CHUNK: gl.constexpr, MANY: gl.constexpr, HALVES: gl.constexpr, RIGHT_REGS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, parts). d_c, d_pe: the cache as [rows, R] and [rows, P], in boxes of PANEL and BLOCK_P columns.

    apart_c, apart_pe: cache rows from one batch row, or page, to the next. p_part: [2 * parts, tiles * 64, R],
    p_part_lse likewise. p_parts: [B, 2], the first part of a batch row and how many parts it has.
    """
    x, bar = _setup(p_q.dtype.element_ty, p_q.dtype.element_ty, LEFT, QUARTER, PANEL, BLOCK_P, HALVES)
    i_tile = gl.program_id(0)
    part = gl.program_id(1)
    _wait_for_earlier()
    share, overhead, row, position = _plan(
        p_start, p_length, B, T, part, gl.num_programs(1), min_share, overhead, CHUNK, MANY
    )
    arrived = Parts(bar.first_full, bar.left_full, bar.last_full, bar.late_full)
    gl.warp_specialize(
        [
            (_left, (x, bar, p_q, p_start, p_length, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, position,
                     share, overhead, B, i_tile, n_tiles, scale_log2, H, S, T, stride_qb, stride_qh, stride_qs,
                     stride_qr, R, LEFT, QUARTER, PANEL, BLOCK_P, CAUSAL, ONE_QUERY, LEFT, x.alpha, False, 1.0,
                     HALVES)),
            (_right, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                      i_tile, n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
                      stride_ps, stride_pr, R, P, LEFT, QUARTER, PANEL, BLOCK_P, ONE_QUERY, 1.0,
                      False)),
            (_fetch, (x, bar, arrived, d_c, d_pe, None, p_start, p_length, p_table, row, position, share, overhead, B,
                      T, apart_c, apart_pe, 0, n_pages, stride_table, n_columns, LEFT, QUARTER, BLOCK_P, PAGE,
                      HALVES)),
        ],
        [4, 1],
        [RIGHT_REGS, 40],
    )  # fmt: skip
