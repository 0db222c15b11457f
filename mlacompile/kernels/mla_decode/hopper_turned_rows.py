"""Queries in FP8 parts, and turned output back in rows: what ``hopper_turned.py`` does once a work item."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlacompile.kernels.mla_decode.hopper_room import ROWS, _here


@gluon.jit
def _power(amax):
    """The exponent k of a power of two for which amax * 2^-k lies in [128, 256)."""
    k = (amax.to(gl.int32, bitcast=True) >> 23) - (127 + 7)
    return gl.minimum(gl.maximum(k, -100), 100)


@gluon.jit
def _two_to(k):
    return ((127 + k) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _part_of_queries(p, i_tile, first, H, S, stride_h, stride_s, stride_r, N: gl.constexpr, WIDTH: gl.constexpr,
                     D: gl.constexpr, STACKED: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """Rows [first, first + N) of a tile's queries, a warp a row; zeros beyond the last. STACKED: every row twice."""
    layout: gl.constexpr = gl.BlockedLayout([1, max(WIDTH // 32, 1)], [1, 32], [gl.num_warps(), 1], [1, 0])
    o_row = first + gl.arange(0, N, gl.SliceLayout(1, layout))
    if STACKED:  # eight rows, and the same again
        o_row = o_row // 16 * 8 + o_row % 8
    else:  # counted here, or rows and addresses would be kept from one item to the next, in local memory
        EACH: gl.constexpr = gl.num_warps()
        o_row = _here(o_row % EACH) + o_row // EACH * EACH
    o_row += i_tile * ROWS
    o_c = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    if ONE_QUERY:
        o_h = o_row
        o_s = o_row * 0
    else:
        o_h = o_row % H
        o_s = o_row // H
    p_row = p + (o_h * stride_h + o_s * stride_s)[:, None] + (o_c * stride_r)[None, :]
    return gl.load(p_row, mask=(o_row < H * S)[:, None] & (o_c < D)[None, :], other=0.0)


@gluon.jit
def _store_queries(x, q, pe, first, STACKED: gl.constexpr, BLOCK_P: gl.constexpr):
    """Some of a tile's queries in two FP8 parts, and the powers of two that their rows were divided by.

    STACKED: both parts in one tile, eight rows rounded, then what that leaves of them, whose rotary part is none.
    """
    by_row: gl.constexpr = gl.SliceLayout(1, q.type.layout)
    q = q.to(gl.float32)
    amax = gl.max(gl.abs(q), 1)
    if BLOCK_P > 0:
        pe = pe.to(gl.float32)
        amax = gl.maximum(amax, gl.convert_layout(gl.max(gl.abs(pe), 1), by_row))
    k = _power(amax)
    down = _two_to(-k)
    q = q * down[:, None]
    high = q.to(gl.float8e4nv)
    if STACKED:
        is_rest = gl.arange(0, q.shape[0], by_row) % 16 >= 8
        high = gl.where(is_rest[:, None], q - high.to(gl.float32), q).to(gl.float8e4nv)
    x.q.index(0).slice(first, q.shape[0], dim=0).store(high)
    if not STACKED:
        x.q.index(1).slice(first, q.shape[0], dim=0).store((q - high.to(gl.float32)).to(gl.float8e4nv))
    if BLOCK_P > 0:
        by_pe_row: gl.constexpr = gl.SliceLayout(1, pe.type.layout)
        if STACKED:
            down = gl.where(gl.arange(0, q.shape[0], by_row) % 16 >= 8, 0.0, down)
        pe = pe * gl.convert_layout(down, by_pe_row)[:, None]
        x.q_pe.slice(first, q.shape[0], dim=0).store(pe.to(x.q_pe.dtype))
    # A conversion to FP8 ends at its largest value: rows that are not finite say so here.
    up = gl.where(amax < float("inf"), _two_to(k), float("nan"))
    x.row_scale.slice(first, q.shape[0], dim=0).store(up)


@gluon.jit
def _convert_queries(x, p_q, p_qpe, i_b, i_tile, H, S, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
                     stride_ps, stride_pr, R: gl.constexpr, P: gl.constexpr, STACKED: gl.constexpr,
                     WIDTH: gl.constexpr, BLOCK_P: gl.constexpr, FIRST: gl.constexpr, N: gl.constexpr,
                     ONE_QUERY: gl.constexpr):  # fmt: skip
    """N rows of a tile of queries, from FIRST on: all are on their way before the first is stored."""
    SOME: gl.constexpr = min(N, 4 * gl.num_warps())  # rows that are converted at once
    p = p_q + i_b.to(gl.int64) * stride_qb
    q0 = _part_of_queries(p, i_tile, FIRST, H, S, stride_qh, stride_qs, stride_qr, SOME, WIDTH, R, STACKED, ONE_QUERY)
    pe0 = q0
    q1 = q0
    pe1 = q0
    if N > SOME:
        q1 = _part_of_queries(
            p, i_tile, FIRST + SOME, H, S, stride_qh, stride_qs, stride_qr, SOME, WIDTH, R, STACKED, ONE_QUERY
        )
    if BLOCK_P > 0:
        p = p_qpe + i_b.to(gl.int64) * stride_pb
        pe0 = _part_of_queries(
            p, i_tile, FIRST, H, S, stride_ph, stride_ps, stride_pr, SOME, BLOCK_P, P, STACKED, ONE_QUERY
        )
        if N > SOME:
            pe1 = _part_of_queries(
                p, i_tile, FIRST + SOME, H, S, stride_ph, stride_ps, stride_pr, SOME, BLOCK_P, P, STACKED, ONE_QUERY
            )
    # Always so, but the compiler does not know, which would send for later rows when the first have arrived.
    if STACKED or _here(i_tile) >= 0:
        _store_queries(x, q0, pe0, FIRST, STACKED, BLOCK_P)
        if N > SOME:
            _store_queries(x, q1, pe1, FIRST + SOME, STACKED, BLOCK_P)


@gluon.jit
def _turn_back(even, odd, share, through, CODE: gl.constexpr):
    """Normalize pairs of output columns and store them, as words, in rows of shared memory: [rows, pairs]."""
    words = gl.inline_asm_elementwise(
        CODE, "=r,f,f", [even * share[None, :], odd * share[None, :]], dtype=gl.int32, is_pure=True, pack=1
    )
    through.permute((1, 0)).store(words)


@gluon.jit
def _store_rows(through, p_out, p_part, whole, i_b, slot, i_tile, n_tiles, H, S, FIRST: gl.constexpr,
                W: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """Write W words of rows of D, from word FIRST on, to the result if the item is a whole row, else to its slot."""
    ACROSS: gl.constexpr = max(W // 128, 1)  # warps
    LANES: gl.constexpr = min(W // 4, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [gl.num_warps() // ACROSS, ACROSS], [1, 0])
    for i in gl.static_range(COLS // 16):
        o_row = _here(i_tile) * ROWS + i * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
        o_c = FIRST + gl.arange(0, W, gl.SliceLayout(0, layout))
        mask = (o_row < H * S)[:, None] & (o_c < D)[None, :]
        o_to = o_row
        p_to = p_part + (slot * n_tiles).to(gl.int64) * ROWS * D
        if whole:
            p_to = p_out + i_b.to(gl.int64) * H * S * D
            if not ONE_QUERY:
                o_to = (o_row % H) * S + o_row // H
        gl.store(p_to + (o_to * D)[:, None] + o_c[None, :], through.slice(i * 16, 16, dim=0).load(layout), mask=mask)
