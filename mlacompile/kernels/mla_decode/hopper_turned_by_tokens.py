"""Scores and softmax of ``hopper_turned.py`` with more than 32 rows: keys are on the left.

Shared memory is what bounds such tiles, and a product of 64 by 64 reads as much as it gives. So both parts of the
queries stand side by side on the right, 128 columns, and each key is read once for both. 64 registers of sums are not
to be had; in float16 they are 32. A score, 16 products of 32 columns, is then off by some 2^-11 of itself, which is
less than what its weight loses in e4m3, and queries are scaled so that no sum can overflow.

Scores so have tokens in rows, and what exponents count from belongs to columns. All warps look for scores that exceed
it, but only where there is one do they look for the largest. Two groups of four warps take blocks by turns, as in
``hopper_turned_by_turns.py``, which says how they depend on one another.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from mlacompile.kernels.hopper import _declare_any, _here, _launch_later, all_warps
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_rows import _limits
from mlacompile.kernels.mla_decode.hopper_turned_by_turns import FP8_ROOM, ROOM, _page_before, _send_first
from mlacompile.kernels.mla_decode.hopper_turned_fetch import _fetch_block, _pages_of
from mlacompile.kernels.mla_decode.hopper_turned_moved import _halves, _joined
from mlacompile.kernels.mla_decode.hopper_turned_room import PLACES, _coarse, _fragment, _is_coarse, _is_weighed
from mlacompile.kernels.mla_decode.hopper_turned_scores import _report, _unit_of_block
from mlacompile.kernels.mla_decode.hopper_turned_shares import _prepare_factors
from mlacompile.kernels.mla_decode.hopper_turned_token_rows import (
    _by_tokens,
    _by_words,
    _counted_from,
    _one,
    _pairs_of_tokens,
    _sums_of_thread,
    _sums_of_warp,
    _sums_of_warps,
    _tell,
    _two_rows,
)
from mlacompile.kernels.mla_decode.hopper_turned_token_scores import (
    _begin_group,
    _begin_scores,
    _end_groups,
    _end_scores,
)

TWO_TO_E4M3 = gl.constexpr("cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;")


@gluon.constexpr_function
def _by_pairs():
    """The layout of what is made of two tokens, the i-th and the (i + 8)-th of 16, which one thread has."""
    rows, lanes = [[0, 1], [0, 8], [0, 16], [0, 32]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(rows, lanes, [[8, 0], [16, 0]], [], [BLOCK // 2, ROWS])


@gluon.jit
def _seen_tokens(s, t, lo, hi, end, sure, i_tile, H, S, T, CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr):
    """Scores of a block, -inf where a row does not see a token."""
    layout: gl.constexpr = _by_tokens()
    if (t < lo) | (t + BLOCK > sure):  # limits are reckoned here, or they would be kept in registers
        o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
        if CAUSAL:
            by_row: gl.constexpr = gl.SliceLayout(0, layout)
            limit, _sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, ROWS)
            s = gl.where((o_t >= lo)[:, None] & (o_t[:, None] < limit[None, :]), s, float("-inf"))
        else:
            s = gl.where(((o_t >= lo) & (o_t < hi))[:, None], s, float("-inf"))
    return s


@gluon.jit
def _store_p(x, exponents, factors, b, t, lo, hi, coarse):
    """P of block b: exponentials times the factors of their tokens, in e4m3 or in float16, turned into rows. Returns
    ``_sums_of_thread``."""
    if (t < lo) | (t + BLOCK > hi):
        o_t = _here(t) + gl.arange(0, BLOCK, gl.SliceLayout(1, _by_tokens()))
        factors = gl.where((o_t >= lo) & (o_t < hi), factors, 0.0)
    if coarse:  # exponentials in here: what is loaded for the store can come sooner then
        e = gl.exp2(exponents)
        sums = _sums_of_thread(e)
        p = e * factors[:, None]
        first, second = gl.split(_pairs_of_tokens(p).permute((0, 2, 3, 1)))
        pairs = gl.inline_asm_elementwise(TWO_TO_E4M3, "=h,f,f", [first, second], dtype=gl.int16, is_pure=True, pack=1)
        pairs = gl.convert_layout(pairs.reshape([BLOCK // 2, ROWS]), _by_pairs(), assert_trivial=True)
        _coarse(x.p, b & 1, gl.int16).permute((1, 0)).store(pairs)
    else:
        e = gl.exp2(exponents)
        sums = _sums_of_thread(e)
        x.p.index(b & 1).permute((1, 0)).store((e * factors[:, None]).to(gl.float16))
    return sums


@gluon.jit
def _scores_by_tokens(x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B,
                      i_tile, n_tiles, scale_log2, H, S, T, coarse_from, cache, WIDTH: gl.constexpr,
                      BLOCK_P: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
                      ONE_QUERY: gl.constexpr, GROUPS: gl.constexpr, SIDE: gl.constexpr):  # fmt: skip
    """As ``_scores_by_turns``."""
    layout: gl.constexpr = _by_tokens()
    by_row: gl.constexpr = gl.SliceLayout(0, layout)
    HALF: gl.constexpr = ROWS // 2
    by_half: gl.constexpr = gl.SliceLayout(0, _fragment(HALF, 4))
    _declare_any(SIDE)
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, end, t, n, skip, rest, taken = _item(
            p_start, p_length, row, position, todo, overhead, T, coarse_from, _is_weighed(GROUPS, False)
        )
        _limit, sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, ROWS)
        total = gl.zeros((4, ROWS), gl.float32, _sums_of_warps())
        sums = gl.zeros((BLOCK // 2, ROWS // 2), gl.int32, _by_words())
        one = 1.0
        p_pages = _pages_of(cache, row, PAGE)
        first, t, unit_of_page = _send_first(x, bar, cache, g, n, row, p_pages, t, WIDTH, BLOCK_P, PAGE, STAGES, SIDE)
        mbarrier.wait(bar.queries.index(item & 1), (item >> 1) & 1)
        scale = gl.max(x.tile_scale.load(_one()), 0) * scale_log2
        all_warps()  # here once, or the compiler has warps wait for each other before each wait of a block
        for i in range(first, n, 2):
            b = g + i
            # Reckoned here, or it would be kept in a register.
            coarse = _is_coarse(_here(lo), hi, n, coarse_from, GROUPS)
            # While products run: what is left of the block before, and what will be needed at once.
            if GROUPS > 1:
                s = _begin_group(x, bar, b, STAGES)
                _prepare_factors(x, b % PLACES, t, lo, hi, GROUPS)
            else:
                s = _begin_scores(x, bar, b, STAGES)
            total += _sums_of_warp(sums) * one
            unit = _unit_of_block(x.largest.index(b % PLACES), t, lo, hi, ROOM)
            unit += gl.where(coarse, float(ROOM - FP8_ROOM), 0.0)
            if GROUPS > 1:
                s = _end_groups(x, s, b, BLOCK_P, STAGES, GROUPS)
                factors = x.largest.index(_here(b) % PLACES).load(gl.SliceLayout(1, layout))
            else:
                row_scale = x.row_scale.load(by_row)
                factors = x.largest.index(b % PLACES).load(gl.SliceLayout(1, layout))
                s = _end_scores(x, s, row_scale, factors, b, BLOCK_P, STAGES)
            before = _counted_from(x, bar, b, i == 0)
            m = before.slice(0, HALF, dim=0).load(by_half) - unit
            if BLOCK_P > 0:
                s = warpgroup_mma_wait(0, deps=(s,))
            s = _seen_tokens(s, t, lo, hi, end, sure, i_tile, H, S, T, CAUSAL, ONE_QUERY)
            if (i == n - 1) & ((row + 1 >= B) | (todo - taken <= overhead)):
                _launch_later()
            unsure = CAUSAL & (t + BLOCK >= sure)  # the block before, which has later tokens, is not seen by all
            s0, s1 = _halves(s)
            s0 = s0 * scale - m[None, :]
            m = before.slice(HALF, HALF, dim=0).load(by_half) - unit  # not sooner: registers are short
            exponents = _joined(s0, s1 * scale - m[None, :])
            exponents, total = _tell(x, bar, exponents, before, total, b, i == 0, unsure, SIDE)
            one = gl.exp2(-unit)
            sums = _store_p(x, exponents, factors * one, b, t, lo, hi, coarse)
            unit_of_page = _page_before(unit_of_page, p_pages, t - STAGES * BLOCK, cache, PAGE)
            fence_async_shared()
            mbarrier.arrive(bar.p_full.index(b & 1), count=1)
            if i + STAGES < n:
                _fetch_block(
                    x, bar, cache, b + STAGES, unit_of_page, p_pages, t - STAGES * BLOCK, WIDTH, BLOCK_P, PAGE, STAGES
                )
            t = _here(t) - 2 * BLOCK  # or the compiler would keep several numbers that follow from it, and spill others
        rows: gl.constexpr = _two_rows()
        total += _sums_of_warp(sums) * one
        total_of_rows = gl.convert_layout(gl.sum(total, 0), rows)
        g += n
        if (g & 1) == SIDE:  # the last block was the other group's
            x.others.index(0).store(total_of_rows)
            x.others.index(1).store(x.m.index(g & 1).load(rows))
            mbarrier.arrive(bar.others, count=1)
        else:
            mbarrier.wait(bar.others, item & 1)
            m = x.m.index((g + 1) & 1).load(rows)
            others = x.others.index(0).load(rows)
            others = gl.where(others == 0.0, 0.0, others * gl.exp2(x.others.index(1).load(rows) - m))
            _report(
                x, bar, m, total_of_rows + others, p_lse, p_part_lse, p_parts, part, row, skip, rest, share, i_tile,
                n_tiles, H, S, rows, ROWS, ONE_QUERY,
            )  # fmt: skip
        item += 1
        todo -= taken
        row += 1
        position = 0
