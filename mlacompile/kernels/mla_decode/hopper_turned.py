"""The Hopper kernel on an e4m3 cache with one factor a token: the cache is never widened in shared memory.

Shared memory, not the tensor cores, bounds the kernels that widen: each value is read, written twice as wide, and read
twice as wide by either product. Here keys are multiplied as the FP8 values that they are, and values on their way
through registers:

    _fetch    one warp: cache rows into STAGES stages
    _scores   four warps: all scores, the softmax, P
    _values   eight warps: the output, turned: O^T = V^T * P^T, four sums of 128 pairs of columns by rows

A query is the sum of two FP8 values, its rounding and what that leaves: with eight bits of mantissa as good as bf16.
Both are multiplied with the same keys and add to one sum; up to 32 rows may be stacked, both parts in one tile, at the
price of one. Rows are scaled by powers of two into the range of FP8, the
rotary part with them, which is exact, and scores are scaled back where they become exponents.

A transposing load of 16-bit words brings pairs of neighbouring columns into the fragments of a left operand. Split
into even and odd columns and converted to float16, which holds every e4m3 value, they are left operands of two products
whose right operand, P^T, has as few columns as there are rows (query, head). P holds the factors of the tokens and is
kept in the range of float16 by counting the largest factor of a block among the scores.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# No "from __future__ import annotations": the fields of an aggregate are types, not strings.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlacompile.kernels.mla_decode.hopper_fetch import _boxes, _copy, _unit
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item, _plan
from mlacompile.kernels.mla_decode.hopper_room import ROWS, _wait_for_earlier
from mlacompile.kernels.mla_decode.hopper_rows import _slot
from mlacompile.kernels.mla_decode.hopper_turned_room import PAIRS, _turned_setup
from mlacompile.kernels.mla_decode.hopper_turned_rows import _convert_queries, _store_rows, _turn_back
from mlacompile.kernels.mla_decode.hopper_turned_scores import _scores

STEP = gl.constexpr(16)  # tokens whose values are multiplied at once: registers are short

# Four e4m3 values, (even, odd) of one token and (even, odd) of the next, to float16: even of both, odd of both.
SPLIT = gl.constexpr(
    "{ .reg .b32 x; .reg .b16 a, b; prmt.b32 x, $2, 0, 0x3120; mov.b32 {a, b}, x; "
    "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)


@gluon.jit
def _add_products(even, odd, p, i, to_even, to_odd):
    """Adds the products of STEP tokens of values and P."""
    right = p.slice(i * STEP, STEP, dim=1).permute((1, 0))
    to_even = warpgroup_mma(even, right, to_even, is_async=True)
    return to_even, warpgroup_mma(odd, right, to_odd, is_async=True)


@gluon.jit
def _columns_of(tile, i, layout: gl.constexpr):
    """128 pairs of columns by STEP tokens: even columns and odd columns as left operands in float16."""
    pairs = tile.slice(i * STEP, STEP, dim=0).permute((1, 0)).load(layout)
    return gl.inline_asm_elementwise(SPLIT, "=r,=r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2)


@gluon.jit
def _clear_dead_words(words, t, lo, hi):
    """Zero the rows of a [64, 128] tile of words whose tokens nobody sees: 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    live = (o_t >= lo) & (o_t < hi)
    for i in gl.static_range(PAIRS // 64):
        panel = words.slice(i * 64, 64, dim=1)
        panel.store(gl.where(live[:, None], panel.load(layout), 0))
    fence_async_shared()


@gluon.jit
def _values(x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B, i_tile,
            n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
            R: gl.constexpr, P: gl.constexpr, PARTS: gl.constexpr, STACKED: gl.constexpr, WIDTH: gl.constexpr,
            BLOCK_P: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr, CODE: gl.constexpr,
            ONE_QUERY: gl.constexpr):  # fmt: skip
    """The output, and at the beginning of each item its queries."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, COLS, 16])
    by_row: gl.constexpr = gl.SliceLayout(0, layout)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    HALVES: gl.constexpr = WIDTH // (2 * PAIRS)
    words = x.k._reinterpret(
        gl.int16,
        [STAGES * HALVES, BLOCK, PAIRS],
        gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
    )
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights = x.p._reinterpret(gl.float16, [2 * ROWS // COLS, COLS, BLOCK], square)
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, _end, t, n, skip, rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        # The P of the previous item's last block was waited for, and it follows the last use of that item's queries.
        _convert_queries(
            x, p_q, p_qpe, row, i_tile, H, S, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
            stride_ps, stride_pr, R, P, PARTS, STACKED, WIDTH, BLOCK_P, 2 * COLS if STACKED else COLS, ONE_QUERY,
        )  # fmt: skip
        fence_async_shared()
        mbarrier.arrive(bar.queries, count=1)

        even0 = gl.zeros((PAIRS, COLS), gl.float32, layout)
        odd0 = gl.zeros((PAIRS, COLS), gl.float32, layout)
        even1 = gl.zeros((PAIRS, COLS), gl.float32, layout)
        odd1 = gl.zeros((PAIRS, COLS), gl.float32, layout)
        for _ in range(n):
            stage = g % STAGES
            buffer = g & 1
            mbarrier.wait(bar.full.index(stage), (g // STAGES) & 1)
            if (t < lo) | (t + BLOCK > hi):
                for i in gl.static_range(HALVES):
                    _clear_dead_words(words.index(HALVES * stage + i), t, lo, hi)
            tile = words.index(HALVES * stage)
            v_even, v_odd = _columns_of(tile, 0, a_layout)
            mbarrier.wait(bar.p_full.index(buffer), (g >> 1) & 1)
            alpha = x.alpha.index(buffer).slice(0, COLS, dim=0).load(by_row)[None, :]
            even0 *= alpha
            odd0 *= alpha
            if HALVES > 1:
                even1 *= alpha
                odd1 *= alpha
            b_p = weights.index(buffer * (ROWS // COLS))
            even0, odd0 = _add_products(v_even, v_odd, b_p, 0, even0, odd0)
            for i in gl.static_range(1, BLOCK // STEP):
                v_even, v_odd = _columns_of(tile, i, a_layout)
                even0, odd0 = _add_products(v_even, v_odd, b_p, i, even0, odd0)
                even0, odd0 = warpgroup_mma_wait(2, deps=(even0, odd0))
            if HALVES > 1:
                tile = words.index(HALVES * stage + 1)
                for i in gl.static_range(BLOCK // STEP):
                    v_even, v_odd = _columns_of(tile, i, a_layout)
                    even1, odd1 = _add_products(v_even, v_odd, b_p, i, even1, odd1)
                    even1, odd1 = warpgroup_mma_wait(2, deps=(even1, odd1))
            mbarrier.arrive(bar.empty.index(stage), count=1)
            even0, odd0, even1, odd1 = warpgroup_mma_wait(0, deps=(even0, odd0, even1, odd1))
            mbarrier.arrive(bar.p_empty.index(buffer), count=1)
            t += BLOCK
            g += 1

        mbarrier.wait(bar.total, item & 1)
        total = x.total.slice(0, COLS, dim=0).load(by_row)
        total = 1.0 / gl.where(total == 0, 1.0, total)
        whole = (skip == 0) & (rest == 0)
        slot = _slot(part, skip)
        # All scores of the item are computed, so its queries are no longer needed.
        ROOM: gl.constexpr = PARTS * ROWS * WIDTH // (4 * COLS)  # words of a row that fit there
        if ROOM >= WIDTH // 2:
            through = x.q._reinterpret(gl.int32, [COLS, WIDTH // 2], wide)
            _turn_back(even0, odd0, total, through.slice(0, PAIRS, dim=1), CODE)
            if HALVES > 1:
                _turn_back(even1, odd1, total, through.slice(PAIRS, PAIRS, dim=1), CODE)
            _store_rows(
                through, p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, 0, WIDTH // 2, R // 2, COLS, ONE_QUERY
            )
        else:
            through = x.q._reinterpret(gl.int32, [COLS, PAIRS], wide)
            _turn_back(even0, odd0, total, through, CODE)
            _store_rows(
                through, p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, 0, PAIRS, R // 2, COLS, ONE_QUERY
            )
            if HALVES > 1:
                _turn_back(even1, odd1, total, through, CODE)
                _store_rows(
                    through, p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, PAIRS, PAIRS, R // 2, COLS,
                    ONE_QUERY,
                )  # fmt: skip
        item += 1
        todo -= taken
        row += 1
        position = 0


@gluon.jit
def _fetch_stages(x, bar, d_c, d_pe, d_scale, p_start, p_length, p_table, row, position, share, overhead, B, T,
                  apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, WIDTH: gl.constexpr,
                  BLOCK_P: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copies blocks into the stages, as soon as each has been used for the last time."""
    BOX: gl.constexpr = d_c.block_type.shape[0]
    PANEL: gl.constexpr = d_c.block_type.shape[1]
    SUB: gl.constexpr = BLOCK // BOX
    PANELS: gl.constexpr = WIDTH // PANEL
    latents = x.k._reinterpret(d_c.dtype, [STAGES * PANELS * SUB, BOX, PANEL], d_c.layout)
    pe = x.pe
    if BLOCK_P > 0:
        pe = x.pe._reinterpret(d_pe.dtype, [STAGES * SUB, BOX, BLOCK_P], d_pe.layout)
    factors = x.factors._reinterpret(gl.float32, _boxes(STAGES * SUB, d_scale.block_type.shape), d_scale.layout)
    g = 0
    todo = share
    while (row < B) & (todo > overhead):
        _lo, _hi, _end, t, n, _skip, _rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        p_pages = p_table
        if PAGE > 0:
            p_pages += row.to(gl.int64) * stride_table
        unit = row
        if SUB == 1:
            unit = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        for i in range(g, g + n):
            stage = i % STAGES
            ahead = unit
            if SUB == 1:  # the next block's page is looked up now, its address is needed at once then
                ahead = _unit(p_pages, row, t + BLOCK, n_pages, n_columns, PAGE)
            mbarrier.wait(bar.empty.index(stage), ((i // STAGES) & 1) ^ 1)
            full = bar.full.index(stage)
            mbarrier.expect(full, BLOCK * (WIDTH + 2 * BLOCK_P + 4))
            _copy(d_c, apart_c, 0, full, latents, stage * PANELS, PANELS,
                  unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            _copy(d_scale, apart_scale, 0, full, factors, stage, 1,
                  unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            if BLOCK_P > 0:
                _copy(d_pe, apart_pe, 0, full, pe, stage, 1,
                      unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            unit = ahead
            t += BLOCK
        g += n
        todo -= taken
        row += 1
        position = 0


@gluon.jit(do_not_specialize=["B", "T", "n_tiles", "n_pages", "n_columns", "stride_table", "min_share", "overhead"])
def _mla_decode_hopper_turned_kernel(
    d_c, d_pe, d_scale, p_q, p_qpe, p_start, p_length, p_table, p_out, p_lse, p_part, p_part_lse, p_parts,
    scale_log2, B, H, S, T, n_tiles, apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, min_share,
    overhead, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
    R: gl.constexpr, P: gl.constexpr, WIDTH: gl.constexpr, BLOCK_P: gl.constexpr, COLS: gl.constexpr,
    PARTS: gl.constexpr, STACKED: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
    CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr, CHUNK: gl.constexpr, MANY: gl.constexpr, CODE: gl.constexpr,
    VALUE_REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As ``_mla_decode_hopper_kernel``. d_c: the cache as e4m3, in boxes of 128 columns. d_scale: the factors, [rows].

    p_out and p_part point to words of two values. COLS: rows of a tile that there can be, 16, 32 or 64. PARTS: of a
    query in FP8. STACKED: two parts, as rows of one tile, if there are 32 rows at most.
    """
    x, bar = _turned_setup(p_q.dtype.element_ty, PARTS, WIDTH, BLOCK_P, STAGES)
    i_tile = gl.program_id(0)
    part = gl.program_id(1)
    _wait_for_earlier()
    share, overhead, row, position = _plan(
        p_start, p_length, B, T, part, gl.num_programs(1), min_share, overhead, CHUNK, MANY
    )
    gl.warp_specialize(
        [
            (_scores, (x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B,
                       i_tile, n_tiles, scale_log2, H, S, T, PARTS, STACKED, BLOCK_P, STAGES, AHEAD, CAUSAL,
                       ONE_QUERY)),
            (_values, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                       i_tile, n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
                       stride_ps, stride_pr, R, P, PARTS, STACKED, WIDTH, BLOCK_P, COLS, STAGES, CODE, ONE_QUERY)),
            (_fetch_stages, (x, bar, d_c, d_pe, d_scale, p_start, p_length, p_table, row, position, share, overhead, B,
                             T, apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, WIDTH, BLOCK_P, PAGE,
                             STAGES)),
        ],
        [8, 1],
        [VALUE_REGS, 24],
    )  # fmt: skip
