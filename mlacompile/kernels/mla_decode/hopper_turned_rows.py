"""Queries in FP8 parts, and turned output back in rows: what ``hopper_turned.py`` does once a work item."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlacompile.kernels.hopper import _here
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_turned_room import _parts_apart, _tile_rows

EIGHT = gl.constexpr(8)  # rows whose both parts lie together where they are stacked: what a warp multiplies at once

REST = 4  # powers of two by which what is left is multiplied where both parts have sums of their own
# Sums of FP8 products in float32 have room for all, and queries have that of FP8. In float16 they end at 65504: 512
# products of 448 and 2^-2 do not reach that.
TOP = gl.constexpr(8)
TOP_IN_FLOAT16 = gl.constexpr(-2)


def _parts_of_queries(rest: str) -> str:
    """Four numbers to e4m3, and what that leaves of each, which is exact in float16, to e4m3. rest: done to that."""

    def left(x: str, numbers: str) -> str:
        return (
            f"cvt.rn.f16x2.f32 x, {numbers}; cvt.rn.f16x2.e4m3x2 y, {x}; sub.f16x2 x, x, y; {rest}"
            f"cvt.rn.satfinite.e4m3x2.f16x2 {x}, x; "
        )

    return (
        "{ .reg .b16 a, b; .reg .b32 x, y; "
        "cvt.rn.satfinite.e4m3x2.f32 a, $3, $2; cvt.rn.satfinite.e4m3x2.f32 b, $5, $4; mov.b32 $0, {a, b}; "
        + left("a", "$3, $2")
        + left("b", "$5, $4")
        + "mov.b32 $1, {a, b}; }"
    )


PARTS_OF_QUERIES = gl.constexpr(_parts_of_queries(""))
PARTS_APART = gl.constexpr(_parts_of_queries(f"mov.b32 y, 0x{(15 + REST << 10) * 0x10001:x}; mul.rn.f16x2 x, x, y; "))


@gluon.jit
def _power(amax, TOP: gl.constexpr):
    """The exponent k of a power of two for which amax * 2^-k lies in [2^(TOP - 1), 2^TOP)."""
    k = (amax.to(gl.int32, bitcast=True) >> 23) - (126 + TOP)
    return gl.minimum(gl.maximum(k, -100), 100)


@gluon.jit
def _two_to(k):
    return ((127 + k) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _queries(p, i_tile, H, S, stride_h, stride_s, stride_r, WIDTH: gl.constexpr, D: gl.constexpr,
             FIRST: gl.constexpr, N: gl.constexpr, STACKED: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """Rows [FIRST, FIRST + N) of a tile's queries; the last row again for those beyond it, zeros beyond column D."""
    layout: gl.constexpr = gl.BlockedLayout([1, max(WIDTH // 32, 1)], [1, 32], [gl.num_warps(), 1], [1, 0])
    # Counted here, or rows and addresses would be kept from one item to the next, in local memory.
    o_row = _here(i_tile) * _tile_rows(STACKED) + FIRST + gl.arange(0, N, gl.SliceLayout(1, layout))
    o_row = gl.minimum(o_row, H * S - 1)
    o_c = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    if ONE_QUERY:
        o_h = o_row
        o_s = o_row * 0
    else:
        o_h = o_row % H
        o_s = o_row // H
    p_row = p + (o_h * stride_h + o_s * stride_s)[:, None] + (o_c * stride_r)[None, :]
    there = (o_row >= 0)[:, None]  # always so; the compiler moves loads without a condition to where they are used
    if D < WIDTH:
        return gl.load(p_row, mask=there & (o_c < D)[None, :], other=0.0)
    else:
        return gl.load(p_row, mask=there)


@gluon.jit
def _largest(x):
    """The largest magnitude of a row's columns that each thread of its warp has: [rows, 32]."""
    return gl.max(gl.abs(x.reshape([x.shape[0], 32, x.shape[1] // 32])), 2)


@gluon.jit
def _stacked(high, rest):
    """Eight rows of the one, then the same of the other, and so on."""
    rows: gl.constexpr = high.shape[0]
    both = gl.join(high, rest)
    if len(high.shape) == 1:
        return both.reshape([rows // EIGHT, EIGHT, 2]).permute((0, 2, 1)).reshape([2 * rows])
    else:
        columns: gl.constexpr = high.shape[1]
        return both.reshape([rows // EIGHT, EIGHT, columns, 2]).permute((0, 3, 1, 2)).reshape([2 * rows, columns])


@gluon.jit
def _store_queries(x, q, pe, FIRST: gl.constexpr, STACKED: gl.constexpr, BLOCK_P: gl.constexpr):
    """Queries in two FP8 parts, and the powers of two that their rows were divided by.

    STACKED: both parts in one tile, eight rows rounded, then what that leaves of them, whose rotary part is none.
    Where parts are apart, all rows of the one and then all of the other are one tile; rotary parts are all divided by
    the largest power of the tile, and of the others only what they are to that is told.
    """
    N: gl.constexpr = q.shape[0]
    APART: gl.constexpr = _parts_apart(x.q.shape)
    by_row: gl.constexpr = gl.SliceLayout(1, q.type.layout)
    q = q.to(gl.float32)
    largest = _largest(q)
    if BLOCK_P >= 32:
        pe = pe.to(gl.float32)
        largest = gl.maximum(largest, gl.convert_layout(_largest(pe), largest.type.layout, assert_trivial=True))
    amax = gl.convert_layout(gl.max(largest, 1), by_row)
    if (BLOCK_P > 0) & (BLOCK_P < 32):
        pe = pe.to(gl.float32)
        amax = gl.maximum(amax, gl.convert_layout(gl.max(gl.abs(pe), 1), by_row))
    k = _power(amax, TOP_IN_FLOAT16 if APART else TOP)
    down = _two_to(-k)
    high, rest = gl.inline_asm_elementwise(
        PARTS_APART if APART else PARTS_OF_QUERIES, "=r,=r,f,f,f,f", [q * down[:, None]],
        dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4,
    )  # fmt: skip
    # A conversion to FP8 ends at its largest value: rows that are not finite say so here.
    finite = amax < float("inf")
    up = gl.where(finite, _two_to(k), float("nan"))
    if STACKED:
        x.q.index(0).slice(2 * FIRST, 2 * N, dim=0).store(_stacked(high, rest))
        x.row_scale.slice(2 * FIRST, 2 * N, dim=0).store(_stacked(up, up))
    else:
        x.q.index(0).slice(FIRST, N, dim=0).store(high)
        if APART:
            x.q.index(0).slice(ROWS + FIRST, N, dim=0).store(rest)
            k_tile = gl.max(gl.where(finite, k, -100), 0)
            down = gl.full((N,), 1.0, gl.float32, by_row) * _two_to(-k_tile)
            x.tile_scale.store(gl.full((1,), 1.0, gl.float32, gl.BlockedLayout([1], [32], [8], [0])) * _two_to(k_tile))
            x.row_scale.store((up * down).to(gl.float16))
        else:
            x.q.index(1).slice(FIRST, N, dim=0).store(rest)
            x.row_scale.slice(FIRST, N, dim=0).store(up)
    if BLOCK_P > 0:
        pe = pe * gl.convert_layout(down, gl.SliceLayout(1, pe.type.layout))[:, None]
        pe = pe.to(x.q_pe.dtype)
        if STACKED:
            x.q_pe.slice(2 * FIRST, 2 * N, dim=0).store(
                _stacked(pe, gl.full(pe.shape, 0.0, x.q_pe.dtype, pe.type.layout))
            )
        else:
            x.q_pe.slice(FIRST, N, dim=0).store(pe)


@gluon.jit
def _convert_queries(x, p_q, p_qpe, i_b, i_tile, H, S, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
                     stride_ps, stride_pr, R: gl.constexpr, P: gl.constexpr, STACKED: gl.constexpr,
                     WIDTH: gl.constexpr, BLOCK_P: gl.constexpr, FIRST: gl.constexpr, N: gl.constexpr,
                     ONE_QUERY: gl.constexpr):  # fmt: skip
    """N rows of a tile of queries, from FIRST on, at once: the compiler has all warps wait before a second store to the
    same memory."""
    p = p_q + i_b.to(gl.int64) * stride_qb
    q = _queries(p, i_tile, H, S, stride_qh, stride_qs, stride_qr, WIDTH, R, FIRST, N, STACKED, ONE_QUERY)
    pe = q
    if BLOCK_P > 0:
        p = p_qpe + i_b.to(gl.int64) * stride_pb
        pe = _queries(p, i_tile, H, S, stride_ph, stride_ps, stride_pr, BLOCK_P, P, FIRST, N, STACKED, ONE_QUERY)
    # Always so, but the compiler does not know, which would send for some of them when the first have arrived.
    if STACKED or _here(i_tile) >= 0:
        _store_queries(x, q, pe, FIRST, STACKED, BLOCK_P)


@gluon.jit
def _turn_back(even, odd, share, through, CODE: gl.constexpr):
    """Normalize pairs of output columns and store them, as words, in rows of shared memory: [rows, pairs]."""
    words = gl.inline_asm_elementwise(
        CODE, "=r,f,f", [even * share[None, :], odd * share[None, :]], dtype=gl.int32, is_pure=True, pack=1
    )
    through.permute((1, 0)).store(words)


@gluon.jit
def _store_rows(through, p_out, p_part, whole, i_b, slot, i_tile, n_tiles, H, S, FIRST: gl.constexpr,
                W: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, STACKED: gl.constexpr,
                ONE_QUERY: gl.constexpr):  # fmt: skip
    """Write W words of rows of D, from word FIRST on, to the result if the item is a whole row, else to its slot."""
    TILE: gl.constexpr = _tile_rows(STACKED)
    ACROSS: gl.constexpr = max(W // 128, 1)  # warps
    LANES: gl.constexpr = min(W // 4, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [gl.num_warps() // ACROSS, ACROSS], [1, 0])
    for i in gl.static_range(COLS // 16):
        o_row = _here(i_tile) * TILE + i * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
        o_c = FIRST + gl.arange(0, W, gl.SliceLayout(0, layout))
        mask = (o_row < H * S)[:, None] & (o_c < D)[None, :]
        o_to = o_row
        p_to = p_part + (slot * n_tiles).to(gl.int64) * TILE * D
        if whole:
            p_to = p_out + i_b.to(gl.int64) * H * S * D
            if not ONE_QUERY:
                o_to = (o_row % H) * S + o_row // H
        gl.store(p_to + (o_to * D)[:, None] + o_c[None, :], through.slice(i * 16, 16, dim=0).load(layout), mask=mask)
