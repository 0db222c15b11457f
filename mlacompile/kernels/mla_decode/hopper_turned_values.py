"""The output of ``hopper_turned.py``: what its eight warps do, and the queries that they convert."""

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
from mlacompile.kernels.mla_decode.hopper_rows import _slot
from mlacompile.kernels.mla_decode.hopper_turned_room import PAIRS
from mlacompile.kernels.mla_decode.hopper_turned_rows import _convert_queries, _store_rows, _turn_back

STEP = gl.constexpr(16)  # tokens whose values are multiplied at once: registers are short

# Four e4m3 values, (even, odd) of one token and (even, odd) of the next, to float16: even of both, odd of both.
SPLIT = gl.constexpr(
    "{ .reg .b32 x; .reg .b16 a, b; prmt.b32 x, $2, 0, 0x3120; mov.b32 {a, b}, x; "
    "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)
# The same, and the next two tokens: their even values, and their odd ones, as they are.
APART = gl.constexpr("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")


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
def _wide_block(x, bar, words, weights, g, stage, buffer, even0, odd0, even1, odd1, HALVES: gl.constexpr):
    """Adds a block's products in 16 bits, and says that its stage is no longer needed."""
    layout: gl.constexpr = even0.type.layout
    COLS: gl.constexpr = even0.shape[1]
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    tile = words.index(HALVES * stage)
    v_even, v_odd = _columns_of(tile, 0, a_layout)
    mbarrier.wait(bar.p_full.index(buffer), (g >> 1) & 1)
    alpha = x.alpha.index(buffer).slice(0, COLS, dim=0).load(gl.SliceLayout(0, layout))[None, :]
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
    return warpgroup_mma_wait(0, deps=(even0, odd0, even1, odd1))


@gluon.jit
def _narrow_columns(tile, layout: gl.constexpr):
    """128 pairs of columns by all tokens of a block: even columns and odd columns as left operands in e4m3.

    A thread has tokens 2t, 2t + 1, 2t + 8 and 2t + 9 of 16, and calls them 4t to 4t + 3, as P does.
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 16])
    pairs = tile.permute((1, 0)).load(gl.DotOperandLayout(0, wide, 2))
    pairs = pairs.reshape([PAIRS, BLOCK // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([PAIRS, BLOCK])
    pairs = gl.convert_layout(pairs, gl.DotOperandLayout(0, layout, 4))
    return gl.inline_asm_elementwise(
        APART, "=r,=r,r,r", [pairs], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4
    )


@gluon.jit
def _narrow_part(x, to, columns, buffer, first):
    """A block's products for some rows are a sum of their own: a sum of FP8 products drops what is small beside it."""
    N: gl.constexpr = to.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, N, 32])
    p = x.p.index(buffer).slice(first, N, dim=0).permute((1, 0))
    nothing = gl.zeros((PAIRS, N), gl.float32, layout)
    products = warpgroup_mma(columns, p, nothing, use_acc=False, is_async=True)
    alpha = x.alpha.index(buffer).slice(first, N, dim=0).load(gl.SliceLayout(0, layout))
    to = gl.convert_layout(to, layout, assert_trivial=True)
    return to * alpha[None, :] + warpgroup_mma_wait(0, deps=(products,))


@gluon.jit
def _narrow_sum(x, to, columns, buffer):
    """32 rows at once, for which there are registers."""
    COLS: gl.constexpr = to.shape[1]
    layout: gl.constexpr = to.type.layout
    if COLS > 32:
        one, two = to.reshape([PAIRS, 2, 32]).permute((0, 2, 1)).split()
        one = _narrow_part(x, one, columns, buffer, 0)
        two = _narrow_part(x, two, columns, buffer, 32)
        to = gl.join(one, two).permute((0, 2, 1)).reshape([PAIRS, COLS])
        return gl.convert_layout(to, layout, assert_trivial=True)
    else:
        return _narrow_part(x, to, columns, buffer, 0)


@gluon.jit
def _narrow_block(x, bar, words, g, stage, buffer, even0, odd0, even1, odd1, HALVES: gl.constexpr):
    """The same in FP8."""
    layout: gl.constexpr = even0.type.layout
    even, odd = _narrow_columns(words.index(HALVES * stage), layout)
    mbarrier.wait(bar.p_full.index(buffer), (g >> 1) & 1)
    even0 = _narrow_sum(x, even0, even, buffer)
    odd0 = _narrow_sum(x, odd0, odd, buffer)
    if HALVES > 1:
        even, odd = _narrow_columns(words.index(HALVES * stage + 1), layout)
        mbarrier.arrive(bar.empty.index(stage), count=1)
        even1 = _narrow_sum(x, even1, even, buffer)
        odd1 = _narrow_sum(x, odd1, odd, buffer)
    else:
        mbarrier.arrive(bar.empty.index(stage), count=1)
    return even0, odd0, even1, odd1


@gluon.jit
def _values(x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B, i_tile,
            n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
            R: gl.constexpr, P: gl.constexpr, PARTS: gl.constexpr, STACKED: gl.constexpr, WIDTH: gl.constexpr,
            NARROW: gl.constexpr, BLOCK_P: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr, CODE: gl.constexpr,
            ONE_QUERY: gl.constexpr):  # fmt: skip
    """The output, and at the beginning of each item its queries."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, COLS, 32 if NARROW else 16]
    )
    by_row: gl.constexpr = gl.SliceLayout(0, layout)
    HALVES: gl.constexpr = WIDTH // (2 * PAIRS)
    words = x.k._reinterpret(
        gl.int16,
        [STAGES * HALVES, BLOCK, PAIRS],
        gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
    )
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights = x.p
    if not NARROW:
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
            if NARROW:
                even0, odd0, even1, odd1 = _narrow_block(
                    x, bar, words, g, stage, buffer, even0, odd0, even1, odd1, HALVES
                )
            else:
                even0, odd0, even1, odd1 = _wide_block(
                    x, bar, words, weights, g, stage, buffer, even0, odd0, even1, odd1, HALVES
                )
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
