"""Scores and softmax of ``hopper_turned.py`` with more than 32 rows and one factor a token: two groups take turns.

What a block takes is the instructions of its scores, in order: their products, the softmax, P. Two groups, each with
every other block, have twice the time, and one multiplies while the other works on exponents: a group begins its
products when the other has issued its own, or both would multiply, and then both reckon.

Blocks depend on one another by what exponents count from. Each group tells the other what it was after its block. It
is moved when a row exceeds it by 2^SLACK, to 2^SPARE more than that, and earlier output of the row is then multiplied
by ``_values``. It never falls, and e4m3 has little range to waste, so the last block of an item is taken first: many
models give their first token a thousand times the weight of any other, and of P counted from there little would be
left. Sums stay with the group, and are put together at the end of an item.
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

from mlacompile.kernels.hopper import _here, _launch_later, all_warps
from mlacompile.kernels.mla_decode.hopper import LOWEST
from mlacompile.kernels.mla_decode.hopper_fetch import _page, _tokens, _unit
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_rows import _limits, _seen
from mlacompile.kernels.mla_decode.hopper_turned_fetch import _fetch_block, _pages_of
from mlacompile.kernels.mla_decode.hopper_turned_moved import _halves, _joined
from mlacompile.kernels.mla_decode.hopper_turned_room import (
    PLACES,
    _coarse_half,
    _fragment,
    _is_coarse,
    _is_weighed,
)
from mlacompile.kernels.mla_decode.hopper_turned_scores import (
    _add_rope,
    _by_thread,
    _fp8_products,
    _of_thread,
    _products,
    _report,
    _unit_of_block,
)
from mlacompile.kernels.mla_decode.hopper_turned_words import _in_order_of_words

SLACK = gl.constexpr(3.75)  # powers of two, as all of these
SPARE = gl.constexpr(2.0)  # what a row that moves leaves for larger scores to come
ROOM = gl.constexpr(10)  # P is 2^(ROOM + SLACK) at most, in e4m3
FP8_ROOM = gl.constexpr(5)  # 2^(FP8_ROOM + SLACK), which is less than 448
QUARTER = gl.constexpr(16)  # tokens


@gluon.jit
def _weighed(x, e, b, i: gl.constexpr, t, lo, hi):
    """A quarter of P: exponentials times the factors of their tokens."""
    by_token: gl.constexpr = gl.SliceLayout(0, _fragment(QUARTER, 4))
    factors = x.largest.index(b % PLACES).slice(i * QUARTER, QUARTER, dim=0).load(by_token)
    # As ``_live_factors``, but asked once a block and reckoned in the branch alone: registers are short.
    if (t < lo) | (t + BLOCK > hi):
        o_t = _here(t) + i * QUARTER + gl.arange(0, QUARTER, by_token)
        factors = gl.where((o_t >= lo) & (o_t < hi), factors, 0.0)
    return e * factors[None, :]


@gluon.jit
def _scores_of_block(x, bar, s, b, BLOCK_P: gl.constexpr, STAGES: gl.constexpr):
    """Scores of block b; rotary ones are begun. They begin when those of the block before are issued.

    The small part of the queries goes first: it is added up more precisely.
    """
    WIDTH: gl.constexpr = x.q.shape[2]
    SOME: gl.constexpr = min(WIDTH, 256)  # columns: addresses of more at once would be too many registers
    stage = b % STAGES
    other = (b + 1) & 1
    zero = _here(stage) >> 8  # or the addresses of both parts of the queries would be kept in registers
    mbarrier.wait(bar.full.index(stage), (b // STAGES) & 1)
    mbarrier.wait(bar.turn.index(other), (((b + 1) >> 1) & 1) ^ 1)
    for i in gl.static_range(WIDTH // SOME):
        keys = x.k.index(stage).slice(i * SOME, SOME, dim=1).permute((1, 0))
        q = x.q.index(zero + 1).slice(i * SOME, SOME, dim=1)
        s = warpgroup_mma(q, keys, s, use_acc=i > 0, is_async=True)
        q = x.q.index(zero).slice(i * SOME, SOME, dim=1)
        s = warpgroup_mma(q, keys, s, is_async=True)
    mbarrier.arrive(bar.turn.index(b & 1), count=1)
    factors = x.factors.index(b % PLACES).load(gl.SliceLayout(0, _fp8_products()))
    s = warpgroup_mma_wait(0, deps=(s,))
    return _add_rope(x, x.q_pe, s, factors, stage, BLOCK_P, _products())


@gluon.jit
def _count_from(x, bar, highest, m_before, b):
    """What the exponents of block b count from, told to the other group and, as alpha, to ``_values``.

    highest: of each row's exponents.
    """
    buffer = b & 1
    m = gl.where(highest - SLACK > m_before, highest + SPARE, m_before)
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
        _coarse_half(to, b & 1).store(_in_order_of_words(_joined(p0.to(gl.float8e4nv), p1.to(gl.float8e4nv))))
    else:
        to.index(b & 1).store(_joined(p0.to(gl.float16), p1.to(gl.float16)))
    return e0 + e1


@gluon.jit
def _counted(total, m_before, m):
    """Sums that counted from m_before, counted from m."""
    by_thread: gl.constexpr = gl.SliceLayout(1, _by_thread(ROWS))
    return total * gl.convert_layout(gl.exp2(m_before - m), by_thread, assert_trivial=True)[:, None]


@gluon.jit
def _send_first(x, bar, cache, g, n, row, p_pages, t, WIDTH: gl.constexpr, BLOCK_P: gl.constexpr,
                PAGE: gl.constexpr, STAGES: gl.constexpr, SIDE: gl.constexpr):  # fmt: skip
    """Sends for those of the first three blocks of an item that are the group's own.

    g: the number of the first block; t: where the tokens begin, the last of which are taken first. Returns which block
    is the group's first, where its tokens begin, and the unit of what was sent for last.
    """
    first = (g + SIDE) & 1
    t += (n - 1 - first) * BLOCK
    n_pages, n_columns = cache[8], cache[9]
    SUB: gl.constexpr = BLOCK // _tokens(cache[0].block_type.shape)
    unit = row
    if SUB == 1:
        unit = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
    if first < n:
        _fetch_block(x, bar, cache, g + first, unit, p_pages, t, WIDTH, BLOCK_P, PAGE, STAGES)
    if (first == 0) & (n > 2):
        if SUB == 1:
            unit = _unit(p_pages, row, t - 2 * BLOCK, n_pages, n_columns, PAGE)
        _fetch_block(x, bar, cache, g + 2, unit, p_pages, t - 2 * BLOCK, WIDTH, BLOCK_P, PAGE, STAGES)
    return first, t, unit


@gluon.jit
def _page_before(unit, p_pages, t, cache, PAGE: gl.constexpr):
    """The page of an earlier block, or the first if there is none. unit: where no page holds a whole block."""
    if (PAGE > 0) & (BLOCK // _tokens(cache[0].block_type.shape) == 1):
        unit = _page(p_pages, gl.maximum(t, 0).to(gl.uint32) // PAGE, cache[8])
    return unit


@gluon.jit
def _scores_by_turns(x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B,
                     i_tile, n_tiles, scale_log2, H, S, T, coarse_from, cache, WIDTH: gl.constexpr,
                     BLOCK_P: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
                     ONE_QUERY: gl.constexpr, GROUPS: gl.constexpr, SIDE: gl.constexpr):  # fmt: skip
    """Scores and softmax of every other block: of those whose number, counted through all items, is SIDE mod 2.

    The last block is taken first. P is e4m3 where ``_is_coarse`` says so. Behind P a group sends for the block that
    comes where this one is, which is the other group's: ``_values`` hold its words by then.
    """
    layout: gl.constexpr = _products()
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    s0 = gl.zeros((ROWS, BLOCK), gl.float32, _fp8_products())
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, end, t, n, skip, rest, taken = _item(
            p_start, p_length, row, position, todo, overhead, T, coarse_from, _is_weighed(GROUPS, False)
        )
        _limit, sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, ROWS)
        m = gl.full((ROWS,), LOWEST, gl.float32, by_row)
        total = gl.zeros((ROWS, 4), gl.float32, _by_thread(ROWS))

        p_pages = _pages_of(cache, row, PAGE)
        first, t, unit = _send_first(x, bar, cache, g, n, row, p_pages, t, WIDTH, BLOCK_P, PAGE, STAGES, SIDE)
        mbarrier.wait(bar.queries.index(item & 1), (item >> 1) & 1)
        row_scale = x.row_scale.load(by_row) * scale_log2
        all_warps()  # here once, or the compiler has warps wait for each other before each wait of a block
        for i in range(first, n, 2):
            b = g + i
            # Reckoned here, or it would be kept in a register.
            coarse = _is_coarse(_here(lo), hi, n, coarse_from, GROUPS)
            s = _scores_of_block(x, bar, s0, b, BLOCK_P, STAGES)
            unit_of_p = _unit_of_block(x.largest.index(b % PLACES), t, lo, hi, ROOM)
            unit_of_p += gl.where(coarse, float(ROOM - FP8_ROOM), 0.0)
            if BLOCK_P > 0:
                s = warpgroup_mma_wait(0, deps=(s,))
            if (t < lo) | (t + BLOCK > sure):  # limits are reckoned here, or they would be kept in registers
                limit, _sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, ROWS)
                s = _seen(s, t, lo, hi, sure, limit, CAUSAL, layout)
            if (i == n - 1) & ((row + 1 >= B) | (todo - taken <= overhead)):
                _launch_later()
            highest = gl.max(s, 1) * row_scale + unit_of_p
            other = (b + 1) & 1
            mbarrier.wait(bar.m.index(other), (((b + 1) >> 1) & 1) ^ 1)
            m_before = gl.where(i > 0, x.m.index(other).load(by_row), LOWEST)
            earlier = m
            m = _count_from(x, bar, highest, m_before, b)
            left, right = _halves(s)
            sums = _half_of_p(x, x.p, left, m, row_scale, b, 0, t, lo, hi, coarse)
            sums += _half_of_p(x, x.p_last, right, m, row_scale, b, 1, t, lo, hi, coarse)
            unit = _page_before(unit, p_pages, t - STAGES * BLOCK, cache, PAGE)
            fence_async_shared()
            mbarrier.arrive(bar.p_full.index(b & 1), count=1)
            total = _counted(total, earlier, m) + _of_thread(sums)
            if i + STAGES < n:
                _fetch_block(x, bar, cache, b + STAGES, unit, p_pages, t - STAGES * BLOCK, WIDTH, BLOCK_P, PAGE, STAGES)
            t = _here(t) - 2 * BLOCK  # or the compiler would keep several numbers that follow from it, and spill others
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
