"""The output of ``hopper_turned.py``: what its last eight warps do, and the queries that they convert."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_rows import _moved, _slot
from mlacompile.kernels.mla_decode.hopper_turned_moved import _shrunk
from mlacompile.kernels.mla_decode.hopper_turned_room import _fragment, _is_coarse, _is_weighed, _sides
from mlacompile.kernels.mla_decode.hopper_turned_rows import _convert_queries, _store_rows, _turn_back
from mlacompile.kernels.mla_decode.hopper_turned_wide import _sum_of_item
from mlacompile.kernels.mla_decode.hopper_turned_words import (
    STEP,
    _add_products,
    _clear_dead_words,
    _columns_of,
    _pairs_of,
    _step_of,
)


@gluon.jit
def _weights_of(x, weights, buffer, group: gl.constexpr, COLS: gl.constexpr, GROUPS: gl.constexpr):
    """P of a block, and of several the one with the factors of a group."""
    if GROUPS > 1:
        return weights.index(buffer * (x.p.shape[1] // COLS) + group * (ROWS // 2 // COLS))
    else:
        return weights.index(buffer * (ROWS // COLS))


@gluon.jit
def _add_block(x, bar, words, weights, g, stage, buffer, first, even0, odd0, even1, odd1, TILE: gl.constexpr,
               TILES: gl.constexpr, GROUPS: gl.constexpr):  # fmt: skip
    """Adds a block's products, and says that its stage and its P are no longer needed.

    The one or two tiles of words are first and the one behind it; TILE: counted from the first columns of a latent.
    """
    layout: gl.constexpr = even0.type.layout
    COLS: gl.constexpr = even0.shape[1]
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    tile = words.index(first)
    pairs = _pairs_of(tile, 0, a_layout)
    v_even, v_odd = _columns_of(pairs)
    mbarrier.wait(bar.p_full.index(buffer), (g >> 1) & 1)
    alpha = x.alpha.index(buffer).slice(0, COLS, dim=0)
    moved = _moved(alpha)
    if moved != 0:
        even0, odd0, even1, odd1 = _shrunk(even0, odd0, even1, odd1, alpha, moved, TILES)
    b_p = _weights_of(x, weights, buffer, TILE, COLS, GROUPS)
    even0, odd0 = _add_products(v_even, v_odd, _step_of(b_p, 0), even0, odd0)
    for i in gl.static_range(1, BLOCK // STEP):
        pairs = _pairs_of(tile, i, a_layout)
        v_even, v_odd = _columns_of(pairs)
        even0, odd0 = _add_products(v_even, v_odd, _step_of(b_p, i), even0, odd0)
        even0, odd0 = warpgroup_mma_wait(2, deps=(even0, odd0))
    if TILES > 1:
        tile = words.index(first + 1)
        b_p = _weights_of(x, weights, buffer, TILE + 1, COLS, GROUPS)
        for i in gl.static_range(BLOCK // STEP):
            pairs = _pairs_of(tile, i, a_layout)
            v_even, v_odd = _columns_of(pairs)
            even1, odd1 = _add_products(v_even, v_odd, _step_of(b_p, i), even1, odd1)
            even1, odd1 = warpgroup_mma_wait(2, deps=(even1, odd1))
    mbarrier.arrive(bar.empty.index(stage), count=1)
    even0, odd0, even1, odd1 = warpgroup_mma_wait(0, deps=(even0, odd0, even1, odd1))
    mbarrier.arrive(bar.p_empty.index(buffer), count=1)
    return even0, odd0, even1, odd1


@gluon.jit
def _values(x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B, i_tile,
            n_tiles, H, S, T, coarse_from, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps,
            stride_pr, R: gl.constexpr, P: gl.constexpr, STACKED: gl.constexpr, WIDTH: gl.constexpr,
            BLOCK_P: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr, CODE: gl.constexpr,
            ONE_QUERY: gl.constexpr, GROUPS: gl.constexpr, SIDE: gl.constexpr):  # fmt: skip
    """The output, and at the beginning of each item its queries. SIDE: which half of both, if two partitions share."""
    SIDES: gl.constexpr = _sides(GROUPS, STACKED)
    WIDE: gl.constexpr = not STACKED
    layout: gl.constexpr = _fragment(COLS, gl.num_warps())
    by_row: gl.constexpr = gl.SliceLayout(0, layout)
    PAIRS: gl.constexpr = 16 * gl.num_warps()  # of columns, multiplied at once
    EACH: gl.constexpr = WIDTH // (2 * PAIRS)  # tiles of a stage
    TILE: gl.constexpr = SIDE * EACH // SIDES  # the first that is multiplied here
    TILES: gl.constexpr = EACH // SIDES if SIDES == 1 else min(EACH // SIDES, GROUPS - TILE)
    N: gl.constexpr = COLS // SIDES  # rows of queries
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    words = x.k._reinterpret(gl.int16, [STAGES * EACH, BLOCK, PAIRS], square)
    weights = x.p
    if not WIDE:
        weights = x.p._reinterpret(gl.float16, [x.p.shape[0] * x.p.shape[1] // COLS, COLS, BLOCK], square)
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, _end, t, n, skip, rest, taken = _item(
            p_start, p_length, row, position, todo, overhead, T, coarse_from, _is_weighed(GROUPS, STACKED)
        )
        if SIDES > 1:  # what the queries are stored over
            mbarrier.wait(bar.rows, (item & 1) ^ 1)
        # The last P of the previous item was waited for, and it follows the last use of that item's queries.
        _convert_queries(
            x, p_q, p_qpe, row, i_tile, H, S, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
            stride_ps, stride_pr, R, P, STACKED, WIDTH, BLOCK_P, SIDE * N, N, ONE_QUERY,
        )  # fmt: skip
        fence_async_shared()
        if WIDE:
            mbarrier.arrive(bar.queries.index(item & 1), count=1)
        else:
            mbarrier.arrive(bar.queries, count=1)

        even0 = gl.zeros((PAIRS, COLS), gl.float32, layout)
        odd0 = gl.zeros((PAIRS, COLS), gl.float32, layout)
        even1 = gl.zeros((PAIRS, COLS), gl.float32, layout)
        odd1 = gl.zeros((PAIRS, COLS), gl.float32, layout)
        if WIDE:
            if _is_coarse(lo, hi, n, coarse_from, GROUPS):
                even0, odd0, even1, odd1 = _sum_of_item(
                    x, bar, words, g, t, n, lo, hi, TILES, STAGES, GROUPS, True, layout
                )
            else:
                even0, odd0, even1, odd1 = _sum_of_item(
                    x, bar, words, g, t, n, lo, hi, TILES, STAGES, GROUPS, False, layout
                )
            g += n
        else:
            for _ in range(n):
                stage = g % STAGES
                mbarrier.wait(bar.full.index(stage), (g // STAGES) & 1)
                if (t < lo) | (t + BLOCK > hi):
                    for i in gl.static_range(TILES):
                        _clear_dead_words(words.index(EACH * stage + TILE + i), t, lo, hi)
                even0, odd0, even1, odd1 = _add_block(
                    x, bar, words, weights, g, stage, g & 1, EACH * stage + TILE, even0, odd0, even1, odd1, TILE,
                    TILES, GROUPS,
                )  # fmt: skip
                t += BLOCK
                g += 1

        mbarrier.wait(bar.total, item & 1)
        factor = x.share.slice(0, COLS, dim=0).load(by_row)
        whole = (skip == 0) & (rest == 0)
        slot = _slot(part, skip)
        # All scores of the item are computed, so its queries are no longer needed, and their room holds its rows.
        W: gl.constexpr = WIDTH // 2 // SIDES
        if SIDES > 1:  # and the last P, by the other side as well
            mbarrier.wait(bar.p_empty.index((g - 1) & 1), ((g - 1) >> 1) & 1)
        if SIDES > 1:
            through = x.q._reinterpret(gl.int32, [ROWS // COLS, COLS, W], wide).index(SIDE * (ROWS // 2 // COLS))
        else:
            through = x.q._reinterpret(gl.int32, [COLS, W], wide)
        _turn_back(even0, odd0, factor, through.slice(0, PAIRS, dim=1), CODE)
        if TILES > 1:
            _turn_back(even1, odd1, factor, through.slice(PAIRS, PAIRS, dim=1), CODE)
        _store_rows(
            through, p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, SIDE * W, W, R // 2, COLS, STACKED,
            ONE_QUERY,
        )  # fmt: skip
        if SIDES > 1:
            mbarrier.arrive(bar.rows, count=1)
        item += 1
        todo -= taken
        row += 1
        position = 0
