"""Scores and softmax of ``hopper_turned.py`` with more than 32 rows: two groups of warps take blocks by turns.

What a block takes is the instructions of its scores, in order: their products, the softmax, P. Two groups, each with
every other block, have twice the time, and one multiplies while the other works on exponents: a group begins its
products when the other has issued its own, or both would multiply, and then both reckon.

Blocks depend on one another by what exponents count from. Each group tells the other what it was after its block. It
is moved when a row exceeds it by 2^SLACK, and earlier output of that row is then multiplied by ``_values``. Where P is
e4m3, which has little range to waste, it is by 2^FP8_SLACK. There it may also fall, but only in the first YOUNG blocks
of an item: behind a first token that has a thousand times the weight of any other, as many models have one, little
would be left of the others. Later a block that is low is mostly chance. Sums stay with the group, and are put together
at the end of an item.
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

from mlacompile.kernels.mla_decode.hopper import LOWEST
from mlacompile.kernels.mla_decode.hopper_fetch import _page, _tokens, _unit
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_room import ROWS, _here, _launch_later, all_warps
from mlacompile.kernels.mla_decode.hopper_rows import SLACK, _limits, _seen
from mlacompile.kernels.mla_decode.hopper_turned_fetch import _fetch_part, _pages_of
from mlacompile.kernels.mla_decode.hopper_turned_moved import _halves, _joined
from mlacompile.kernels.mla_decode.hopper_turned_room import PLACES, _coarse, _fragment, _is_coarse, _of_part
from mlacompile.kernels.mla_decode.hopper_turned_scores import (
    HEADROOM,
    _add_rope,
    _by_thread,
    _fp8_products,
    _of_thread,
    _products,
    _report,
    _unit_of_block,
)
from mlacompile.kernels.mla_decode.hopper_turned_words import _in_order_of_words

FP8_HEADROOM = gl.constexpr(8)  # P in e4m3 reaches 2^8 at most
FP8_SLACK = gl.constexpr(3.0)  # powers of two, as all of these
FP8_SPARE = gl.constexpr(2.0)  # what the first block of an item leaves for larger scores to come
FP8_LESS_ROOM = gl.constexpr((HEADROOM - SLACK) - (FP8_HEADROOM - FP8_SLACK))  # than float16 has for one weight
YOUNG = gl.constexpr(8)  # blocks of an item in which what exponents count from may fall, too:
DROP = gl.constexpr(12.0)  # where a block stays so far below the largest number that P may be,
STEADY = gl.constexpr(12.0)  # by no more than this at once, or earlier output, in the same unit, would overflow
QUARTER = gl.constexpr(16)  # tokens


@gluon.jit
def _weighed(x, e, b, i: gl.constexpr, t, lo, hi):
    """A quarter of P: exponentials times the factors of their tokens."""
    by_token: gl.constexpr = gl.SliceLayout(0, _fragment(QUARTER, 4))
    factors = x.factors.index(b % PLACES).slice(i * QUARTER, QUARTER, dim=0).load(by_token)
    # As ``_live_factors``, but asked once a block and reckoned in the branch alone: registers are short.
    if (t < lo) | (t + BLOCK > hi):
        o_t = _here(t) + i * QUARTER + gl.arange(0, QUARTER, by_token)
        factors = gl.where((o_t >= lo) & (o_t < hi), factors, 0.0)
    return e * factors[None, :]


@gluon.jit
def _scores_of_block(x, bar, s, b, BLOCK_P: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr):
    """Scores of block b, part by part as they arrive; rotary ones are begun.

    The small part of the queries goes first: it is added up more precisely. Of whole blocks they begin when those of
    the block before are issued.
    """
    WIDTH: gl.constexpr = x.q.shape[2]
    SOME: gl.constexpr = min(WIDTH, 256)  # columns: addresses of more at once would be too many registers
    stage = b % STAGES
    other = (b + 1) & 1
    zero = _here(stage) >> 8  # or the addresses of both parts of the queries would be kept in registers
    for i in gl.static_range(WIDTH // SOME):
        if i < PARTS:
            mbarrier.wait(_of_part(bar.full, bar.full_last, stage, i), (b // STAGES) & 1)
        if (PARTS == 1) & (i == 0):
            mbarrier.wait(bar.turn.index(other), (((b + 1) >> 1) & 1) ^ 1)
        keys = x.k.index(stage).slice(i * SOME, SOME, dim=1).permute((1, 0))
        q = x.q.index(zero + 1).slice(i * SOME, SOME, dim=1)
        s = warpgroup_mma(q, keys, s, use_acc=i > 0, is_async=True)
        q = x.q.index(zero).slice(i * SOME, SOME, dim=1)
        s = warpgroup_mma(q, keys, s, is_async=True)
    if PARTS == 1:
        mbarrier.arrive(bar.turn.index(b & 1), count=1)
    factors = x.factors.index(b % PLACES).load(gl.SliceLayout(0, _fp8_products()))
    s = warpgroup_mma_wait(0, deps=(s,))
    return _add_rope(x, x.q_pe, s, factors, stage, BLOCK_P, _products())


@gluon.jit
def _count_from(x, bar, s, m_before, row_scale, unit, coarse, b, i, PARTS: gl.constexpr):
    """What the exponents of block b count from, told to the other group and, as alpha, to ``_values``. i: its number in
    its item."""
    buffer = b & 1
    highest = gl.max(s, 1) * row_scale + unit
    if PARTS == 1:
        slack = gl.where(coarse, FP8_SLACK, SLACK)
        spare = gl.where(coarse & (i == 0), FP8_SPARE, 0.0)
        low = gl.where(coarse & (i < YOUNG), FP8_SLACK - DROP, float("-inf"))
        m = gl.where(highest > m_before + slack, highest + spare, m_before)
        m = gl.where(highest < m_before + low, gl.maximum(highest, m_before - STEADY), m)
    else:
        m = gl.where(highest > m_before + SLACK, highest, m_before)
    mbarrier.wait(bar.p_empty.index(buffer), ((b >> 1) & 1) ^ 1)
    x.m.index(buffer).store(m)
    x.alpha.index(buffer).store(gl.exp2(m_before - m))
    mbarrier.arrive(bar.m.index(buffer), count=1)
    return m


@gluon.jit
def _half_of_p(x, to, s, m, row_scale, b, i: gl.constexpr, t, lo, hi, coarse):
    """Exponentials of half a block's scores: stores P, in e4m3 or in float16, and returns their sums in pairs."""
    by_quarter: gl.constexpr = gl.SliceLayout(1, _fragment(QUARTER, 4))
    exponent = gl.convert_layout(m, by_quarter, assert_trivial=True)[:, None]
    scale = gl.convert_layout(row_scale, by_quarter, assert_trivial=True)[:, None]
    s0, s1 = _halves(s)
    e0 = gl.exp2(s0 * scale - exponent)
    e1 = gl.exp2(s1 * scale - exponent)
    p0 = _weighed(x, e0, b, 2 * i, t, lo, hi)
    p1 = _weighed(x, e1, b, 2 * i + 1, t, lo, hi)
    if coarse:
        _coarse(to, b & 1).store(_in_order_of_words(_joined(p0.to(gl.float8e4nv), p1.to(gl.float8e4nv))))
    else:
        to.index(b & 1).store(_joined(p0.to(gl.float16), p1.to(gl.float16)))
    return e0 + e1


@gluon.jit
def _counted(total, m_before, m):
    """Sums that counted from m_before, counted from m."""
    by_thread: gl.constexpr = gl.SliceLayout(1, _by_thread(ROWS))
    return total * gl.convert_layout(gl.exp2(m_before - m), by_thread, assert_trivial=True)[:, None]


@gluon.jit
def _fetch_parts(x, bar, cache, b, unit, p_pages, t, WIDTH: gl.constexpr, BLOCK_P: gl.constexpr, PAGE: gl.constexpr,
                 STAGES: gl.constexpr, FIRST: gl.constexpr, END: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """Sends for parts [FIRST, END) of block b, each when its room has been used for the last time."""
    stage = b % STAGES
    for i in gl.static_range(FIRST, END):
        mbarrier.wait(_of_part(bar.empty, bar.empty_last, stage, i), ((b // STAGES) & 1) ^ 1)
        _fetch_part(x, bar, cache, b, unit, p_pages, t, WIDTH, BLOCK_P, PAGE, STAGES, i, PARTS)


@gluon.jit
def _scores_by_turns(x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B,
                     i_tile, n_tiles, scale_log2, H, S, T, coarse_from, cache, WIDTH: gl.constexpr,
                     BLOCK_P: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
                     CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr, SIDE: gl.constexpr):  # fmt: skip
    """Scores and softmax of every other block: of those whose number, counted through all items, is SIDE mod 2.

    Each group sends for its own blocks, for the next while it works on this one: for EARLY parts before P of this one,
    because ``_values`` are done with their room by then. With one part P is e4m3 where ``_is_coarse`` says so.
    """
    EARLY: gl.constexpr = max(PARTS // 2, 1)
    n_pages, n_columns = cache[8], cache[9]
    SUB: gl.constexpr = BLOCK // _tokens(cache[0].block_type.shape)
    layout: gl.constexpr = _products()
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    s0 = gl.zeros((ROWS, BLOCK), gl.float32, _fp8_products())
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, end, t, n, skip, rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        _limit, sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, ROWS)
        m = gl.full((ROWS,), LOWEST, gl.float32, by_row)
        total = gl.zeros((ROWS, 4), gl.float32, _by_thread(ROWS))

        first = (g + SIDE) & 1
        t += first * BLOCK
        p_pages = _pages_of(cache, row, PAGE)
        unit = row
        if SUB == 1:
            unit = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        if first < n:
            _fetch_parts(x, bar, cache, g + first, unit, p_pages, t, WIDTH, BLOCK_P, PAGE, STAGES, 0, PARTS, PARTS)
        if SIDE == 0:  # noqa: SIM102
            if (g == 0) & (n > 2):  # all stages are free, and the queries are still to come
                if SUB == 1:
                    unit = _unit(p_pages, row, t + 2 * BLOCK, n_pages, n_columns, PAGE)
                _fetch_parts(x, bar, cache, 2, unit, p_pages, t + 2 * BLOCK, WIDTH, BLOCK_P, PAGE, STAGES, 0, PARTS,
                             PARTS)  # fmt: skip

        mbarrier.wait(bar.queries.index(item & 1), (item >> 1) & 1)
        row_scale = x.row_scale.load(by_row) * scale_log2
        all_warps()  # here once, or the compiler has warps wait for each other before each wait of a block
        for i in range(first, n, 2):
            b = g + i
            if (PAGE > 0) & (SUB == 1):  # the next block's page is looked up now, its address is needed at once then
                ahead = gl.minimum(t + 2 * BLOCK, gl.maximum(_here(hi) - 1, 0))  # or of the last, which the table has
                unit = _page(p_pages, ahead.to(gl.uint32) // PAGE, n_pages)
            # Reckoned here, or it would be kept in a register.
            coarse = _is_coarse(_here(lo), hi, n, coarse_from, PARTS)
            s = _scores_of_block(x, bar, s0, b, BLOCK_P, STAGES, PARTS)
            unit_of_p = _unit_of_block(x, b % PLACES, t, lo, hi) + gl.where(coarse, FP8_LESS_ROOM, 0.0)
            if BLOCK_P > 0:
                s = warpgroup_mma_wait(0, deps=(s,))
            if (t < lo) | (t + BLOCK > sure):  # limits are reckoned here, or they would be kept in registers
                limit, _sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, ROWS)
                s = _seen(s, t, lo, hi, sure, limit, CAUSAL, layout)
            if (i == n - 1) & ((row + 1 >= B) | (todo - taken <= overhead)):
                _launch_later()
            other = (b + 1) & 1
            mbarrier.wait(bar.m.index(other), (((b + 1) >> 1) & 1) ^ 1)
            m_before = gl.where(i > 0, x.m.index(other).load(by_row), LOWEST)
            earlier = m
            m = _count_from(x, bar, s, m_before, row_scale, unit_of_p, coarse, b, i, PARTS)
            if (i + 2 < n) & (b > 0):
                _fetch_parts(x, bar, cache, b + 2, unit, p_pages, t + 2 * BLOCK, WIDTH, BLOCK_P, PAGE, STAGES, 0,
                             EARLY, PARTS)  # fmt: skip
            left, right = _halves(s)
            sums = _half_of_p(x, x.p, left, m, row_scale, b, 0, t, lo, hi, coarse)
            sums += _half_of_p(x, x.p_last, right, m, row_scale, b, 1, t, lo, hi, coarse)
            fence_async_shared()
            mbarrier.arrive(bar.p_full.index(b & 1), count=1)
            total = _counted(total, earlier, m) + _of_thread(sums)
            t += 2 * BLOCK
            if EARLY < PARTS:  # noqa: SIM102
                if (i + 2 < n) & (b > 0):
                    _fetch_parts(x, bar, cache, b + 2, unit, p_pages, t, WIDTH, BLOCK_P, PAGE, STAGES, EARLY, PARTS,
                                 PARTS)  # fmt: skip
        total_of_rows = gl.convert_layout(gl.sum(total, 1), by_row)
        g += n
        if (g & 1) == SIDE:  # the last block was the other group's
            x.others.index(0).store(total_of_rows)
            x.others.index(1).store(m)
            mbarrier.arrive(bar.others, count=1)
        else:
            mbarrier.wait(bar.others, item & 1)
            total_of_rows += x.others.index(0).load(by_row) * gl.exp2(x.others.index(1).load(by_row) - m)
            _report(
                x, bar, m, total_of_rows, p_lse, p_part_lse, p_parts, part, row, skip, rest, share, i_tile, n_tiles, H,
                S, by_row, ROWS, ONE_QUERY,
            )  # fmt: skip
        item += 1
        todo -= taken
        row += 1
        position = 0
