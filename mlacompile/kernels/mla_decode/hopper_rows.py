"""What the partitions that compute do with a tile of 64 rows (query, head): queries in, scores, softmax, output out."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from mlacompile.kernels.hopper import _here
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_room import ROWS

SMALLEST = gl.constexpr(1e-30)
STEADY = gl.constexpr(2.0**-20)
SLACK = gl.constexpr(6.0)  # powers of two by which a row may exceed what it counts from before that moves
GROUP = gl.constexpr(8)  # rows: columns of a turned product that lie side by side in a fragment


@gluon.jit
def _rows(i_tile, H, ONE_QUERY: gl.constexpr, layout: gl.constexpr, N: gl.constexpr = ROWS):
    """Numbers of the N rows of a tile, and the head and query of each."""
    o_row = _here(i_tile) * N + gl.arange(0, N, layout)
    if ONE_QUERY:
        return o_row, o_row, o_row * 0
    else:
        return o_row, o_row % H, o_row // H


@gluon.jit
def _count(H, S, ONE_QUERY: gl.constexpr):
    """How many rows (query, head) there are. Multiplied here, or the product would be kept from the beginning."""
    if ONE_QUERY:
        return H
    else:
        return _here(H) * S


@gluon.jit
def _limits(i_tile, H, S, T, hi, end, CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr, layout: gl.constexpr,
            N: gl.constexpr = ROWS):  # fmt: skip
    """Where what each row sees ends, if CAUSAL, and up to where no row of the tile needs a mask."""
    sure = hi
    limit = gl.full((N,), 0, gl.int32, layout)
    if CAUSAL:
        _row, _h, o_s = _rows(i_tile, H, ONE_QUERY, layout, N)
        limit = gl.minimum(end - S + o_s + 1, T)
        sure = gl.minimum(end - S + (i_tile * N) // H + 1, T)
    return limit, sure


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
    return gl.load(p_row, mask=(o_row < _count(H, S, ONE_QUERY))[:, None] & (o_c < D)[None, :], other=0.0)


@gluon.jit
def _shrunk(q, dtype: gl.constexpr, SHRINK: gl.constexpr):
    """Queries as their tile holds them: bfloat16 loses nothing in float16 unless it is beyond 8e6 or below 1e-3."""
    if q.dtype == dtype:
        return q
    else:
        return (q.to(gl.float32) * SHRINK).to(dtype)


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
def _computed(s, s_pe, factor, FACTORED: gl.constexpr, BLOCK_P: gl.constexpr, BEHIND: gl.constexpr):
    """Waits for the scores of a block, behind which so many products have been begun."""
    if FACTORED:
        if BLOCK_P > 0:
            s, s_pe = warpgroup_mma_wait(BEHIND, deps=(s, s_pe))
            s = s * factor[None, :] + s_pe
        else:
            s = warpgroup_mma_wait(BEHIND, deps=(s,))
            s = s * factor[None, :]
    else:
        s = warpgroup_mma_wait(BEHIND, deps=(s,))
    return s


@gluon.jit
def _factors(factors, unit, t, lo, hi, FACTORED: gl.constexpr, layout: gl.constexpr):
    """The factors of a block's latents, and the unit in which P is to be held: the largest of them.

    In units of its block P fits into float16. A unit is not much smaller than the one before, so that earlier output,
    which changes units as well, does not overflow.
    """
    factor = 1.0
    if FACTORED:
        factor = factors.load(gl.SliceLayout(0, layout))
        if (t < lo) | (t + BLOCK > hi):  # the factor of a token that nobody sees may be NaN
            o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
            factor = gl.where((o_t >= lo) & (o_t < hi), factor, 0.0)
        unit = gl.maximum(gl.max(gl.abs(factor), 0), gl.maximum(unit * STEADY, SMALLEST))
    return factor, unit


@gluon.jit
def _weights(e, factor, unit, dtype: gl.constexpr, FACTORED: gl.constexpr):
    """P as it is multiplied with the values in shared memory."""
    if FACTORED:
        e = e * (factor * (1.0 / unit))[None, :]
    return e.to(dtype)


@gluon.jit
def _seen(s, t, lo, hi, sure, limit, CAUSAL: gl.constexpr, layout: gl.constexpr):
    """Scores of a block, -inf where a row does not see a token. sure, limit: as for ``_softmax``."""
    if (t < lo) | (t + BLOCK > sure):
        o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
        if CAUSAL:
            s = gl.where((o_t >= lo)[None, :] & (o_t[None, :] < limit[:, None]), s, float("-inf"))
        else:
            s = gl.where(((o_t >= lo) & (o_t < hi))[None, :], s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, m, t, lo, hi, sure, limit, scale_log2, CAUSAL: gl.constexpr, layout: gl.constexpr,
             SELDOM: gl.constexpr):  # fmt: skip
    """Masked scores of a block, what exponents count from (base 2), and the factor for what was summed before.

    sure: every row sees the tokens [lo, sure). limit: past the last token that each row sees, when CAUSAL. SELDOM: what
    exponents count from is not always the largest so far, but less than that by 2^SLACK at most.
    """
    s = _seen(s, t, lo, hi, sure, limit, CAUSAL, layout)
    highest = gl.max(s, 1) * scale_log2
    if SELDOM:
        m_new = gl.where(highest > m + SLACK, highest, m)
    else:
        m_new = gl.maximum(m, highest)
    return s, m_new, gl.exp2(m - m_new)


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def _moved(alpha):
    """Bit i: whether a row of group i counts from another maximum than before. Every warp looks at all rows: none waits
    for another."""
    layout: gl.constexpr = gl.BlockedLayout([max(alpha.shape[0] // 32, 1)], [32], [gl.num_warps()], [0])
    group = gl.arange(0, alpha.shape[0], layout) // GROUP
    return gl.reduce(gl.where(alpha.load(layout) != 1.0, 1 << group, 0), 0, _either)


@gluon.jit
def _rescaled(here, alpha, first, second, BOTH: gl.constexpr, SELDOM: gl.constexpr):
    """Earlier output in units of a new maximum. here: alpha of all rows, in shared memory; SELDOM: looked at first."""
    if SELDOM:
        moved = _moved(here)
    else:
        moved = 1
    if moved != 0:
        first = first * alpha[:, None]
        if BOTH:
            second = second * alpha[:, None]
    return first, second


@gluon.jit
def _store_columns(o, total, through, p_out, p_part, whole, i_b, slot, i_tile, n_tiles, H, S, COLUMN: gl.constexpr,
                   WIDTH: gl.constexpr, R: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """Normalize output columns and write them: to the result if the item is a whole row, else to its slot.

    through: shared memory of the same shape, free by now, that turns fragments of a product into whole rows.
    """
    share = 1.0 / gl.where(total == 0, 1.0, total)
    dtype: gl.constexpr = p_out.dtype.element_ty
    through = through._reinterpret(dtype, [ROWS, WIDTH], through.layout)
    through.store((o * share[:, None]).to(dtype))
    layout: gl.constexpr = _row_wise(WIDTH)
    o_row, o_h, o_s = _rows(i_tile, H, ONE_QUERY, gl.SliceLayout(1, layout))
    o_c = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    mask = (o_row < _count(H, S, ONE_QUERY))[:, None] & (o_c < R)[None, :]
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
