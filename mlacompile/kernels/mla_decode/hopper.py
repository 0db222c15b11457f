"""The Gluon kernel of ``mla_decode`` for compute capability 9.0: TMA, asynchronous wgmma, three specialized partitions.

One program owns an SM. A tile has 64 rows (query, head); its float32 output, 64 x 512, fills half of the registers, so
two groups of four warps share it, and one more warp fetches the cache:

    _fetch   cache rows, contiguous or by pages, into two stages of shared memory, each in three parts
    _left    all scores, the softmax, and output columns [0, LEFT) with P from registers
    _right   the other columns, as two quarters, with P from shared memory

A block of 64 tokens is loaded once and serves as key and as value. The parts of a stage have barriers of their own, in
the order in which they fall free: the first quarter with the rotary keys, the left half, the last quarter. ``_left``
issues the product with V of block n before the scores of block n + 1, so that reloading hides behind both; ``_right``
multiplies its last quarter while ``_left`` computes the softmax. Barriers whose two sides can be two blocks apart are
double.

``hopper_plan.py`` says which blocks of which rows a program works on. A row that ends up in several programs leaves
normalized partials in the dtype of the cache (they are averages of it, so they fit), which ``merge.py`` combines.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# No "from __future__ import annotations": the fields of an aggregate are types, not strings.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import core

from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item, _plan

aggregate = getattr(core, "aggregate", None) or core._aggregate
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after Triton 3.6

ROWS = gl.constexpr(64)  # rows of a tile: what one wgmma takes
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.3e38)  # a finite start of the running maximum: -inf - -inf would be NaN


@aggregate
class Tiles:
    """Shared memory. Two stages of cache: stage i has left[i], right[2 * i], right[2 * i + 1] and pe[i]."""

    q_left: gl.shared_memory_descriptor  # [64, LEFT]
    q_right: gl.shared_memory_descriptor  # [2, 64, QUARTER]
    q_pe: gl.shared_memory_descriptor  # [64, BLOCK_P]
    left: gl.shared_memory_descriptor  # [2, 64, LEFT]
    right: gl.shared_memory_descriptor  # [4, 64, QUARTER]
    pe: gl.shared_memory_descriptor  # [2, 64, BLOCK_P]
    p: gl.shared_memory_descriptor  # [64, 64], the softmax's numerators
    alpha: gl.shared_memory_descriptor  # [2, 64], factors by which earlier output shrinks
    total: gl.shared_memory_descriptor  # [64], the softmax's denominators

    @gluon.constexpr_function
    def __init__(self, q_left, q_right, q_pe, left, right, pe, p, alpha, total):
        self.q_left, self.q_right, self.q_pe = q_left, q_right, q_pe
        self.left, self.right, self.pe = left, right, pe
        self.p, self.alpha, self.total = p, alpha, total


@aggregate
class Signals:
    """Barriers. The first seven exist once a stage; the others are waited for once a block or once a work item."""

    first_full: gl.shared_memory_descriptor  # first quarter and rotary keys have arrived
    left_full: gl.shared_memory_descriptor
    last_full: gl.shared_memory_descriptor
    first_empty: gl.shared_memory_descriptor
    left_empty: gl.shared_memory_descriptor
    last_empty: gl.shared_memory_descriptor
    alpha: gl.shared_memory_descriptor  # alpha of a block is published
    scores: gl.shared_memory_descriptor  # the scores of the next block are computed, or there is none
    p_full: gl.shared_memory_descriptor
    p_empty: gl.shared_memory_descriptor
    queries: gl.shared_memory_descriptor  # _right has stored its part of an item's queries
    total: gl.shared_memory_descriptor  # an item's denominators are published

    @gluon.constexpr_function
    def __init__(self, first_full, left_full, last_full, first_empty, left_empty, last_empty, alpha, scores, p_full,
                 p_empty, queries, total):  # fmt: skip
        self.first_full, self.left_full, self.last_full = first_full, left_full, last_full
        self.first_empty, self.left_empty, self.last_empty = first_empty, left_empty, last_empty
        self.alpha, self.scores, self.p_full, self.p_empty = alpha, scores, p_full, p_empty
        self.queries, self.total = queries, total


@aggregate
class Parts:
    """Barriers of the three parts of a stage, once a stage each."""

    first: gl.shared_memory_descriptor
    left: gl.shared_memory_descriptor
    last: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, first, left, last):
        self.first, self.left, self.last = first, left, last


# ---- pieces of the partitions --------------------------------------------------------------------------------------


@gluon.jit
def _here(x):
    """x, but the compiler must not know: what follows from it is computed here, not kept in registers from before."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _rows(i_tile, H, ONE_QUERY: gl.constexpr, layout: gl.constexpr):
    """Row numbers of a tile, and the head and query of each."""
    o_row = _here(i_tile) * ROWS + gl.arange(0, ROWS, layout)
    if ONE_QUERY:
        return o_row, o_row, o_row * 0
    else:
        return o_row, o_row % H, o_row // H


@gluon.constexpr_function
def _row_wise(width):
    """A layout in which a warp holds whole rows, 16 bytes a thread, for global memory."""
    across = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def _queries(p, i_tile, H, S, stride_h, stride_s, stride_r, COLUMN: gl.constexpr, WIDTH: gl.constexpr,
             D: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """Columns [COLUMN, COLUMN + WIDTH) of a tile's queries; zeros beyond the last row and beyond column D."""
    layout: gl.constexpr = _row_wise(WIDTH)
    o_row, o_h, o_s = _rows(i_tile, H, ONE_QUERY, gl.SliceLayout(1, layout))
    o_c = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    p_row = p + (o_h * stride_h + o_s * stride_s)[:, None] + (o_c * stride_r)[None, :]
    return gl.load(p_row, mask=(o_row < H * S)[:, None] & (o_c < D)[None, :], other=0.0)


@gluon.jit
def _clear_dead(tile, t, lo, hi, WIDTH: gl.constexpr, PANEL: gl.constexpr):
    """Zero the rows of a [64, WIDTH] tile of values whose tokens nobody sees: 0 * NaN is NaN."""
    layout: gl.constexpr = _row_wise(PANEL)
    o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    live = (o_t >= lo) & (o_t < hi)
    for i in gl.static_range(WIDTH // PANEL):
        panel = tile.slice(i * PANEL, PANEL, dim=1)
        panel.store(gl.where(live[:, None], panel.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _rope_scores(q_pe, pe, s, s0, FACTORED: gl.constexpr):
    """Adds the scores of the rotary keys to s, or begins a sum of their own, as they have no factor."""
    if FACTORED:
        return s, warpgroup_mma(q_pe, pe.permute((1, 0)), s0, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(q_pe, pe.permute((1, 0)), s, is_async=True), s0


@gluon.jit
def _computed(s, s_pe, factors, FACTORED: gl.constexpr, BLOCK_P: gl.constexpr, layout: gl.constexpr):
    """Waits for the scores of a block."""
    if FACTORED:
        if BLOCK_P > 0:
            s, s_pe = warpgroup_mma_wait(0, deps=(s, s_pe))
            s = s * factors.load(gl.SliceLayout(0, layout))[None, :] + s_pe
        else:
            s = warpgroup_mma_wait(0, deps=(s,))
            s = s * factors.load(gl.SliceLayout(0, layout))[None, :]
    else:
        s = warpgroup_mma_wait(0, deps=(s,))
    return s


@gluon.jit
def _weights(e, factors, t, lo, hi, dtype: gl.constexpr, FACTORED: gl.constexpr, layout: gl.constexpr):
    """P as it is multiplied with the values in shared memory."""
    if FACTORED:
        factor = factors.load(gl.SliceLayout(0, layout))
        if (t < lo) | (t + BLOCK > hi):  # the factor of a token that nobody sees may be NaN
            o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
            factor = gl.where((o_t >= lo) & (o_t < hi), factor, 0.0)
        e = e * factor[None, :]
    return e.to(dtype)


@gluon.jit
def _softmax(s, m, t, lo, hi, sure, limit, scale_log2, CAUSAL: gl.constexpr, layout: gl.constexpr):
    """Masked scores of a block, the new running maximum (base 2), and the factor for what was summed before.

    sure: every row sees the tokens [lo, sure). limit: past the last token that each row sees, when CAUSAL.
    """
    if (t < lo) | (t + BLOCK > sure):
        o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
        if CAUSAL:
            s = gl.where((o_t >= lo)[None, :] & (o_t[None, :] < limit[:, None]), s, float("-inf"))
        else:
            s = gl.where(((o_t >= lo) & (o_t < hi))[None, :], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    return s, m_new, gl.exp2(m - m_new)


@gluon.jit
def _store_columns(o, total, through, p_out, p_part, whole, i_b, slot, i_tile, n_tiles, H, S, COLUMN: gl.constexpr,
                   WIDTH: gl.constexpr, R: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """Normalize output columns and write them: to the result if the item is a whole row, else to its slot.

    through: shared memory of the same shape, free by now, that turns fragments of a product into whole rows.
    """
    share = 1.0 / gl.where(total == 0, 1.0, total)
    through.store((o * share[:, None]).to(through.dtype))
    layout: gl.constexpr = _row_wise(WIDTH)
    o_row, o_h, o_s = _rows(i_tile, H, ONE_QUERY, gl.SliceLayout(1, layout))
    o_c = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    mask = (o_row < H * S)[:, None] & (o_c < R)[None, :]
    if whole:
        p_to = p_out + i_b.to(gl.int64) * H * S * R
        o_to = o_h * S + o_s
    else:
        p_to = p_part + (slot * n_tiles).to(gl.int64) * ROWS * R
        o_to = o_row
    gl.store(p_to + (o_to * R)[:, None] + o_c[None, :], through.load(layout), mask=mask)


@gluon.jit
def _slot(part, skip):
    """Where an item's partial goes: a part continues at most one row of earlier parts, and leaves at most one open."""
    return 2 * part + gl.where(skip == 0, 1, 0)


# ---- the partitions ------------------------------------------------------------------------------------------------


@gluon.jit
def _unit(p_pages, row, t, n_pages, n_columns, PAGE: gl.constexpr):
    """The page of a token, kept inside the cache whatever the table says; of a contiguous cache its batch row."""
    if PAGE > 0:
        column = gl.minimum(t.to(gl.uint32) // PAGE, n_columns.to(gl.uint32) - 1)
        page = gl.load(p_pages + column)
        return gl.minimum(gl.maximum(page, 0), n_pages - 1)
    else:
        return row


@gluon.constexpr_function
def _columns(shape):
    """Columns of a box: a box of rank 1 has one."""
    return shape[1] if len(shape) > 1 else 1


@gluon.constexpr_function
def _boxes(count, shape):
    """The shape of so many boxes."""
    return [count, *shape]


@gluon.jit
def _scales_at(stage, QUARTER: gl.constexpr, G: gl.constexpr):
    """Where a stage's [64, G] factors stand, counted in such boxes: behind the bytes of its first quarter."""
    return stage * (QUARTER // G) + QUARTER // (4 * G)


@gluon.jit
def _copy(desc, apart, column, full, to, first, N: gl.constexpr, unit, p_pages, t, n_pages, n_columns,
          PAGE: gl.constexpr):  # fmt: skip
    """Send for N panels of a block's columns. to: boxes of shared memory, those of panel k begin at (first + k) * SUB.

    unit: the page or batch row of the block, where one is enough; smaller pages are looked up here.
    """
    BOX: gl.constexpr = desc.block_type.shape[0]
    SUB: gl.constexpr = BLOCK // BOX
    for j in range(SUB):  # not unrolled: this partition has 32 registers
        o_t = t + j * BOX
        if SUB > 1:
            unit = _unit(p_pages, unit, o_t, n_pages, n_columns, PAGE)
        if PAGE > 0:
            o_t = o_t & (PAGE - 1)
        o_row = unit * apart + o_t
        if len(desc.block_type.shape) == 1:
            load_tile(desc, [o_row], full, to.index(first * SUB + j))
        else:
            for k in gl.static_range(N):
                o_c = column + k * desc.block_type.shape[1]
                load_tile(desc, [o_row, o_c], full, to.index((first + k) * SUB + j))


@gluon.jit
def _fetch(x, bar, arrived, d_c, d_pe, d_scale, p_start, p_length, p_table, row, position, share, overhead, B, T,
           apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, LEFT: gl.constexpr, QUARTER: gl.constexpr,
           BLOCK_P: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """Copies blocks into the two stages, part by part, as soon as each part has been used for the last time.

    arrived: barriers of the three parts. What is narrower than 16 bits fills the first half of its part only; its
    factors (d_scale) stand where the second half of the first quarter begins.
    """
    BOX: gl.constexpr = d_c.block_type.shape[0]
    PANEL: gl.constexpr = d_c.block_type.shape[1]
    SUB: gl.constexpr = BLOCK // BOX
    BYTES: gl.constexpr = d_c.dtype.primitive_bitwidth // 8
    N_LEFT: gl.constexpr = LEFT // PANEL
    N_QUARTER: gl.constexpr = QUARTER // PANEL
    PITCH: gl.constexpr = 2 // BYTES
    left = x.left._reinterpret(d_c.dtype, [2 * N_LEFT * PITCH * SUB, BOX, PANEL], d_c.layout)
    right = x.right._reinterpret(d_c.dtype, [4 * N_QUARTER * PITCH * SUB, BOX, PANEL], d_c.layout)
    pe = x.pe
    if BLOCK_P > 0:
        pe = x.pe._reinterpret(d_pe.dtype, [2 * SUB, BOX, BLOCK_P], d_pe.layout)
    scales = x.right
    G: gl.constexpr = 0 if d_scale is None else _columns(d_scale.block_type.shape)
    if d_scale is not None:
        count: gl.constexpr = 2 * QUARTER // G * SUB
        scales = x.right._reinterpret(gl.float32, _boxes(count, d_scale.block_type.shape), d_scale.layout)
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
            stage = i & 1
            free = ((i >> 1) & 1) ^ 1
            ahead = unit
            if SUB == 1:  # the next block's page is looked up now, its address is needed at once then
                ahead = _unit(p_pages, row, t + BLOCK, n_pages, n_columns, PAGE)

            mbarrier.wait(bar.first_empty.index(stage), free)
            full = arrived.first.index(stage)
            mbarrier.expect(full, BLOCK * (QUARTER * BYTES + BLOCK_P * 2 + G * 4))
            _copy(d_c, apart_c, LEFT, full, right, 2 * stage * N_QUARTER * PITCH, N_QUARTER,
                  unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            if BLOCK_P > 0:
                _copy(d_pe, apart_pe, 0, full, pe, stage, 1,
                      unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            if d_scale is not None:
                _copy(d_scale, apart_scale, 0, full, scales, _scales_at(stage, QUARTER, G), 1,
                      unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip

            mbarrier.wait(bar.left_empty.index(stage), free)
            full = arrived.left.index(stage)
            mbarrier.expect(full, BLOCK * LEFT * BYTES)
            _copy(d_c, apart_c, 0, full, left, stage * N_LEFT * PITCH, N_LEFT,
                  unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip

            mbarrier.wait(bar.last_empty.index(stage), free)
            full = arrived.last.index(stage)
            mbarrier.expect(full, BLOCK * QUARTER * BYTES)
            _copy(d_c, apart_c, LEFT + QUARTER, full, right, (2 * stage + 1) * N_QUARTER * PITCH, N_QUARTER,
                  unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            unit = ahead
            t += BLOCK
        g += n
        todo -= taken
        row += 1
        position = 0


@gluon.jit
def _left(x, bar, p_q, p_start, p_length, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, position, share,
          overhead, B, i_tile, n_tiles, scale_log2, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr,
          R: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr, BLOCK_P: gl.constexpr,
          CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr, WIDEST: gl.constexpr, factors,
          FACTORED: gl.constexpr):  # fmt: skip
    """Scores and softmax of every block, and the left columns of the output.

    WIDEST: columns of one wgmma. factors: if FACTORED [2, 64], what the latents of a stage are still to be multiplied
    with.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(LEFT, WIDEST), 16]
    )
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = p_q.dtype.element_ty
    s0 = gl.zeros((ROWS, BLOCK), gl.float32, s_layout)
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, end, t, n, skip, rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        sure = hi
        limit = gl.full((ROWS,), 0, gl.int32, s_row)
        if CAUSAL:
            _r_row, _r_h, r_s = _rows(i_tile, H, ONE_QUERY, s_row)
            limit = gl.minimum(end - S + r_s + 1, T)
            sure = gl.minimum(end - S + (i_tile * ROWS) // H + 1, T)

        p = p_q + row.to(gl.int64) * stride_qb
        x.q_left.store(_queries(p, i_tile, H, S, stride_qh, stride_qs, stride_qr, 0, LEFT, R, ONE_QUERY))
        fence_async_shared()
        o = gl.zeros((ROWS, LEFT), gl.float32, o_layout)
        m = gl.full((ROWS,), LOWEST, gl.float32, s_row)

        # The first block: nothing to overlap with yet.
        stage = g & 1
        phase = (g >> 1) & 1
        mbarrier.wait(bar.queries, item & 1)
        mbarrier.wait(bar.first_full.index(stage), phase)
        s = warpgroup_mma(
            x.q_right.index(0), x.right.index(2 * stage).permute((1, 0)), s0, use_acc=False, is_async=True
        )
        s_pe = s0
        if BLOCK_P > 0:
            s, s_pe = _rope_scores(x.q_pe, x.pe.index(stage), s, s0, FACTORED)
        mbarrier.wait(bar.left_full.index(stage), phase)
        s = warpgroup_mma(x.q_left, x.left.index(stage).permute((1, 0)), s, is_async=True)
        mbarrier.wait(bar.last_full.index(stage), phase)
        s = warpgroup_mma(x.q_right.index(1), x.right.index(2 * stage + 1).permute((1, 0)), s, is_async=True)
        s = _computed(s, s_pe, factors.index(stage), FACTORED, BLOCK_P, s_layout)
        s, m, alpha = _softmax(s, m, t, lo, hi, sure, limit, scale_log2, CAUSAL, s_layout)
        x.alpha.index(stage).store(alpha)
        mbarrier.arrive(bar.alpha.index(stage), count=1)
        e = gl.exp2(s * scale_log2 - m[:, None])
        total = gl.sum(e, 1)
        b_p = _weights(e, factors.index(stage), t, lo, hi, dtype, FACTORED, s_layout)
        x.p.store(b_p)
        fence_async_shared()
        mbarrier.arrive(bar.p_full, count=1)
        a_p = gl.convert_layout(b_p, p_layout)

        for _ in range(n - 1):
            stage = g & 1
            other = stage ^ 1
            phase = ((g + 1) >> 1) & 1
            if (t < lo) | (t + BLOCK > hi):
                _clear_dead(x.left.index(stage), t, lo, hi, LEFT, PANEL)
            o = warpgroup_mma(a_p, x.left.index(stage), o, is_async=True)
            mbarrier.wait(bar.first_full.index(other), phase)
            s = warpgroup_mma(
                x.q_right.index(0), x.right.index(2 * other).permute((1, 0)), s0, use_acc=False, is_async=True
            )
            if BLOCK_P > 0:
                s, s_pe = _rope_scores(x.q_pe, x.pe.index(other), s, s0, FACTORED)
                o = warpgroup_mma_wait(2, deps=(o,))
            else:
                o = warpgroup_mma_wait(1, deps=(o,))
            mbarrier.arrive(bar.left_empty.index(stage), count=1)
            mbarrier.wait(bar.left_full.index(other), phase)
            s = warpgroup_mma(x.q_left, x.left.index(other).permute((1, 0)), s, is_async=True)
            mbarrier.wait(bar.last_full.index(other), phase)
            s = warpgroup_mma(x.q_right.index(1), x.right.index(2 * other + 1).permute((1, 0)), s, is_async=True)
            s = _computed(s, s_pe, factors.index(other), FACTORED, BLOCK_P, s_layout)
            mbarrier.arrive(bar.scores, count=1)
            t += BLOCK
            s, m, alpha = _softmax(s, m, t, lo, hi, sure, limit, scale_log2, CAUSAL, s_layout)
            x.alpha.index(other).store(alpha)
            mbarrier.arrive(bar.alpha.index(other), count=1)
            e = gl.exp2(s * scale_log2 - m[:, None])
            b_p = _weights(e, factors.index(other), t, lo, hi, dtype, FACTORED, s_layout)
            mbarrier.wait(bar.p_empty, g & 1)
            x.p.store(b_p)
            fence_async_shared()
            mbarrier.arrive(bar.p_full, count=1)
            # From here on _right works too.
            o = o * gl.convert_layout(alpha, o_row)[:, None]
            a_p = gl.convert_layout(b_p, p_layout)
            total = total * alpha + gl.sum(e, 1)
            g += 1

        # The last block: no scores follow.
        stage = g & 1
        mbarrier.arrive(bar.scores, count=1)
        if (t < lo) | (t + BLOCK > hi):
            _clear_dead(x.left.index(stage), t, lo, hi, LEFT, PANEL)
        o = warpgroup_mma(a_p, x.left.index(stage), o, is_async=True)
        x.total.store(total)
        mbarrier.arrive(bar.total, count=1)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(bar.left_empty.index(stage), count=1)

        whole = (skip == 0) & (rest == 0)
        slot = _slot(part, skip)
        total_o = gl.convert_layout(total, o_row)
        _store_columns(
            o, total_o, x.q_left, p_out, p_part, whole, row, slot, i_tile, n_tiles, H, S, 0, LEFT, R, ONE_QUERY
        )
        r_row, r_h, r_s = _rows(i_tile, H, ONE_QUERY, s_row)
        lse = gl.where(total == 0, float("-inf"), m + gl.log2(total))
        if whole:
            o_lse = (row.to(gl.int64) * H + r_h) * S + r_s
            gl.store(p_lse + o_lse, lse * LN2, mask=r_row < H * S)
        else:
            gl.store(p_part_lse + slot * n_tiles * ROWS + r_row, lse, mask=r_row < H * S)
        if (skip == 0) & (i_tile == 0):
            gl.store(p_parts + 2 * row, part)
            gl.store(p_parts + 2 * row + 1, 1 + (rest + share - 1) // share)
        mbarrier.wait(bar.p_empty, g & 1)
        g += 1
        item += 1
        todo -= taken
        row += 1
        position = 0


@gluon.jit
def _right(x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B, i_tile,
           n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
           R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr,
           BLOCK_P: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """The columns beyond LEFT, as two quarters: the second is multiplied while the next softmax is computed."""
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
        for k in gl.static_range(2):
            x.q_right.index(k).store(
                _queries(p, i_tile, H, S, stride_qh, stride_qs, stride_qr, LEFT + k * QUARTER, QUARTER, R, ONE_QUERY)
            )
        if BLOCK_P > 0:
            p = p_qpe + row.to(gl.int64) * stride_pb
            x.q_pe.store(_queries(p, i_tile, H, S, stride_ph, stride_ps, stride_pr, 0, BLOCK_P, P, ONE_QUERY))
        fence_async_shared()
        mbarrier.arrive(bar.queries, count=1)

        o1 = gl.zeros((ROWS, QUARTER), gl.float32, layout)
        o2 = gl.zeros((ROWS, QUARTER), gl.float32, layout)
        for _ in range(n):
            stage = g & 1
            phase = (g >> 1) & 1
            mbarrier.wait(bar.alpha.index(stage), phase)
            alpha = x.alpha.index(stage).load(o_row)
            o1 = o1 * alpha[:, None]
            o2 = o2 * alpha[:, None]
            mbarrier.wait(bar.first_full.index(stage), phase)
            mbarrier.wait(bar.last_full.index(stage), phase)
            mbarrier.wait(bar.p_full, g & 1)
            if (t < lo) | (t + BLOCK > hi):
                _clear_dead(x.right.index(2 * stage), t, lo, hi, QUARTER, PANEL)
                _clear_dead(x.right.index(2 * stage + 1), t, lo, hi, QUARTER, PANEL)
            o1 = warpgroup_mma(x.p, x.right.index(2 * stage), o1, is_async=True)
            o1 = warpgroup_mma_wait(0, deps=(o1,))
            mbarrier.arrive(bar.first_empty.index(stage), count=1)
            mbarrier.wait(bar.scores, g & 1)
            o2 = warpgroup_mma(x.p, x.right.index(2 * stage + 1), o2, is_async=True)
            o2 = warpgroup_mma_wait(0, deps=(o2,))
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


@gluon.jit
def _barriers(N: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=1)
    if N > 1:
        return bars
    else:
        return bars.index(0)


@gluon.jit
def _begin():
    """Let the merge be launched while this kernel drains, and wait for what was launched before this kernel."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _setup(dtype: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr, BLOCK_P: gl.constexpr):
    """Shared memory and barriers of a program."""
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * PANEL, element_bitwidth=16, rank=2)
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    NARROW: gl.constexpr = BLOCK_P if BLOCK_P > 0 else 16
    narrow: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * NARROW, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x = Tiles(
        gl.allocate_shared_memory(dtype, [ROWS, LEFT], wide),
        gl.allocate_shared_memory(dtype, [2, ROWS, QUARTER], wide),
        gl.allocate_shared_memory(dtype, [ROWS, NARROW], narrow),
        gl.allocate_shared_memory(dtype, [2, BLOCK, LEFT], wide),
        gl.allocate_shared_memory(dtype, [4, BLOCK, QUARTER], wide),
        gl.allocate_shared_memory(dtype, [2, BLOCK, NARROW], narrow),
        gl.allocate_shared_memory(dtype, [ROWS, BLOCK], square),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], plain),
        gl.allocate_shared_memory(gl.float32, [ROWS], plain),
    )
    bar = Signals(
        _barriers(2), _barriers(2), _barriers(2), _barriers(2), _barriers(2), _barriers(2), _barriers(2),
        _barriers(1), _barriers(1), _barriers(1), _barriers(1), _barriers(1),
    )  # fmt: skip
    fence_async_shared()
    return x, bar


@gluon.jit(do_not_specialize=["B", "T", "n_tiles", "n_pages", "n_columns", "stride_table", "min_share", "overhead"])
def _mla_decode_hopper_kernel(
    d_c, d_pe, p_q, p_qpe, p_start, p_length, p_table, p_out, p_lse, p_part, p_part_lse, p_parts,
    scale_log2, B, H, S, T, n_tiles, apart_c, apart_pe, n_pages, stride_table, n_columns, min_share, overhead,
    stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
    R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr,
    BLOCK_P: gl.constexpr, PAGE: gl.constexpr, CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr,
    CHUNK: gl.constexpr, MANY: gl.constexpr, RIGHT_REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, parts). d_c, d_pe: the cache as [rows, R] and [rows, P], in boxes of PANEL and BLOCK_P columns.

    apart_c, apart_pe: cache rows from one batch row, or page, to the next. p_part: [2 * parts, tiles * 64, R],
    p_part_lse likewise. p_parts: [B, 2], the first part of a batch row and how many parts it has.
    """
    _begin()
    i_tile = gl.program_id(0)
    part = gl.program_id(1)
    share, overhead, row, position = _plan(
        p_start, p_length, B, T, part, gl.num_programs(1), min_share, overhead, CHUNK, MANY
    )

    x, bar = _setup(p_q.dtype.element_ty, LEFT, QUARTER, PANEL, BLOCK_P)
    arrived = Parts(bar.first_full, bar.left_full, bar.last_full)
    gl.warp_specialize(
        [
            (_left, (x, bar, p_q, p_start, p_length, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, position,
                     share, overhead, B, i_tile, n_tiles, scale_log2, H, S, T, stride_qb, stride_qh, stride_qs,
                     stride_qr, R, LEFT, QUARTER, PANEL, BLOCK_P, CAUSAL, ONE_QUERY, LEFT, x.alpha, False)),
            (_right, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                      i_tile, n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
                      stride_ps, stride_pr, R, P, LEFT, QUARTER, PANEL, BLOCK_P, ONE_QUERY)),
            (_fetch, (x, bar, arrived, d_c, d_pe, None, p_start, p_length, p_table, row, position, share, overhead, B,
                      T, apart_c, apart_pe, 0, n_pages, stride_table, n_columns, LEFT, QUARTER, BLOCK_P, PAGE)),
        ],
        [4, 1],
        [RIGHT_REGS, 32],
    )  # fmt: skip
