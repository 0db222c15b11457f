"""The Hopper kernel of ``fp8_linear`` for few quantized rows: reading the weight is the limit, and never pauses.

    _fetch     one warp: blocks of 128 columns of x and of the weight, by TMA, as many stages ahead as memory holds
    _multiply  four warps, once or twice: 64 rows of x by 128 rows of the weight

The blocks of all tiles form one line, tile after tile, and each of the programs, one an SM, takes an equal stretch of
it: whatever the shape, all of them read to the end. (Osama et al., "Stream-K", arXiv 2301.03598, cut products like
that.) A tile that is whole in a stretch is stored as it is. Of one that is cut each program stores what it has summed,
in float32, and ``_fp8_cut_kernel`` adds the pieces, in order. Where cutting costs more than it evens out, stretches are
whole tiles.

Products are those of ``hopper.py``: the tensor cores add up one block of 128 columns, and what they have summed is
multiplied with its two scales and added in float32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# No "from __future__ import annotations": the fields of an aggregate are types, not strings.
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from mlacompile.kernels.fp8_linear.hopper import BLOCK_K, ROWS, Room, _added, store_tile
from mlacompile.kernels.mla_decode.hopper_fetch import load_tile
from mlacompile.kernels.mla_decode.hopper_room import _here, _launch_later, _wait_for_earlier

COLUMNS = gl.constexpr(128)  # of the result: rows of the weight that make a tile


@gluon.jit
def _fetch(room, d_x, d_w, d_w2, begin, end, blocks, N1, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
           TWO: gl.constexpr):  # fmt: skip
    """Copies the blocks from begin to end of the line, each as soon as all have multiplied what its stage held."""
    row = begin // blocks * COLUMNS
    k = begin % blocks
    for g in range(end - begin):
        stage = g % STAGES
        mbarrier.wait(room.empty.index(stage), ((g // STAGES) & 1) ^ 1)
        full = room.full.index(stage)
        mbarrier.expect(full, (BLOCK_M + COLUMNS) * BLOCK_K)
        if TWO and row >= N1:
            load_tile(d_w2, [row - N1, k * BLOCK_K], full, room.w.index(stage))
        else:
            load_tile(d_w, [row, k * BLOCK_K], full, room.w.index(stage))
        load_tile(d_x, [0, k * BLOCK_K], full, room.x.index(stage))
        k += 1
        if k == blocks:
            k = 0
            row += COLUMNS


@gluon.jit
def _scales(p_x_descale, p_descale, o_x, o_w, k, stride_xsk):
    """Of block k: those of the thread's rows of x, and that of the weight."""
    return gl.load(p_x_descale + (o_x + k * stride_xsk)), gl.load(p_descale + (o_w + k))


@gluon.jit
def _leave(acc, out, d_out, p_part, piece, whole, o_row, column, M, UPPER: gl.constexpr, BLOCK_M: gl.constexpr):
    """Store a whole tile's sums by TMA, which leaves out what is beyond the edges, or a piece of them, in float32."""
    if whole:
        tma.store_wait(0)
        out.store(acc.to(out.dtype))
        fence_async_shared()
        store_tile(d_out, [UPPER, column], out)
    elif p_part is not None:
        o_n = gl.arange(0, COLUMNS, gl.SliceLayout(0, acc.type.layout))
        o_piece = (piece * BLOCK_M + o_row)[:, None] * COLUMNS + o_n[None, :]
        gl.store(p_part + o_piece, acc, mask=(o_row < M)[:, None])


@gluon.jit
def _multiply(room, d_out, p_part, p_x_descale, p_descale, p_descale2, begin, end, blocks, M, N1, stride_xsm,
              stride_xsk, stride_sn, stride_sn2, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
              TWO: gl.constexpr):  # fmt: skip
    """64 rows of each tile: those of group GROUP, 0 or 1. Scales are read two blocks ahead.

    Pieces go to p_part, [programs, 2, BLOCK_M, 128]: the end of a tile to the first of two, its beginning to the
    second.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 32]
    )
    UPPER: gl.constexpr = GROUP * ROWS
    never = M < 0  # the compiler must not know: so a product stays in the registers of the one before
    block = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    out = room.out.index(GROUP)
    o_row = UPPER + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_x = gl.minimum(o_row, M - 1) * stride_xsm
    o_zero = _here(o_row) // (3 * ROWS)  # or one register would get the scale, and products wait behind it
    g = 0
    at = begin
    while at < end:
        row = at // blocks * COLUMNS  # of the weight
        first = at % blocks
        last = gl.minimum(first + end - at, blocks) - 1
        p_w = p_descale
        o_w = o_zero + row // BLOCK_K * stride_sn
        if TWO and row >= N1:
            p_w = p_descale2
            o_w = o_zero + (row - N1) // BLOCK_K * stride_sn2
        x_scale, w_scale = _scales(p_x_descale, p_w, o_x, o_w, first, stride_xsk)
        x_next, w_next = _scales(p_x_descale, p_w, o_x, o_w, gl.minimum(first + 1, last), stride_xsk)
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        for k in range(first, last + 1):
            stage = g % STAGES
            mbarrier.wait(room.full.index(stage), (g // STAGES) & 1)
            block = warpgroup_mma(
                room.x.index(stage).slice(UPPER, ROWS, dim=0), room.w.index(stage).permute((1, 0)), block,
                use_acc=never, is_async=True,
            )  # fmt: skip
            factor = x_scale * w_scale
            x_scale = x_next
            w_scale = w_next
            x_next, w_next = _scales(p_x_descale, p_w, o_x, o_w, gl.minimum(k + 2, last), stride_xsk)
            block = warpgroup_mma_wait(0, deps=(block,))
            mbarrier.arrive(room.empty.index(stage), count=1)
            acc = _added(acc, block, factor)
            g += 1
        piece = 2 * gl.program_id(0) + gl.where(first == 0, 1, 0)
        _leave(acc, out, d_out, p_part, piece, last + 1 - first == blocks, o_row, row, M, UPPER, BLOCK_M)
        at += last + 1 - first
    _launch_later()
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "share"])
def _fp8_stream_kernel(
    d_x, p_x_descale, d_w, p_descale, d_w2, p_descale2, d_out, p_part, M, N, N1, K, stride_xsm, stride_xsk, stride_sn,
    stride_sn2, share, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, REGS: gl.constexpr, TWO: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (programs,), each with ``share`` blocks of the line.

    d_x, d_w: descriptors of [M, K], M at most BLOCK_M, 64 or 128, and of [N, K]; what is beyond is read as zeros. TWO:
    weight rows from N1 on, a multiple of 128, are those of a second weight. d_out: of [M, N], in boxes of 64 rows by
    128. p_part: float32 [programs, 2, BLOCK_M, 128] if tiles are cut, else None.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=BLOCK_M // ROWS)
    room = Room(
        gl.allocate_shared_memory(d_x.dtype, [STAGES, BLOCK_M, BLOCK_K], d_x.layout),
        gl.allocate_shared_memory(d_w.dtype, [STAGES, COLUMNS, BLOCK_K], d_w.layout),
        gl.allocate_shared_memory(d_out.dtype, [BLOCK_M // ROWS, ROWS, COLUMNS], d_out.layout),
        full,
        empty,
    )
    fence_async_shared()
    blocks = gl.cdiv(K, BLOCK_K)
    begin = gl.program_id(0) * share
    end = gl.minimum(begin + share, gl.cdiv(N, COLUMNS) * blocks)
    _wait_for_earlier()
    if BLOCK_M == ROWS:
        gl.warp_specialize(
            [
                (_multiply, (room, d_out, p_part, p_x_descale, p_descale, p_descale2, begin, end, blocks, M, N1,
                             stride_xsm, stride_xsk, stride_sn, stride_sn2, 0, BLOCK_M, STAGES, TWO)),
                (_fetch, (room, d_x, d_w, d_w2, begin, end, blocks, N1, BLOCK_M, STAGES, TWO)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (room, d_out, p_part, p_x_descale, p_descale, p_descale2, begin, end, blocks, M, N1,
                             stride_xsm, stride_xsk, stride_sn, stride_sn2, 0, BLOCK_M, STAGES, TWO)),
                (_multiply, (room, d_out, p_part, p_x_descale, p_descale, p_descale2, begin, end, blocks, M, N1,
                             stride_xsm, stride_xsk, stride_sn, stride_sn2, 1, BLOCK_M, STAGES, TWO)),
                (_fetch, (room, d_x, d_w, d_w2, begin, end, blocks, N1, BLOCK_M, STAGES, TWO)),
            ],
            [4, 1],
            [REGS, 24],
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "share"])
def _fp8_cut_kernel(
    p_part, p_out, M, N, K, share, BLOCK_M: tl.constexpr, SOME: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Adds the pieces of every tile that is cut, SOME of its rows a program, in order.

    Grid: (programs that made them - 1, ⌈M / SOME⌉). Program i has the tile in which the stretch of i + 1 begins, if it
    is the first that begins in it.
    """
    i = tl.program_id(0) + 1
    blocks = tl.cdiv(K, 128)
    tile = i * share // blocks
    start = tile * blocks
    o_m = tl.program_id(1) * SOME + tl.arange(0, SOME)
    o_n = tl.arange(0, 128)
    if (i * share > start) & ((i - 1) * share <= start):
        o = o_m[:, None] * 128 + o_n[None, :]
        mask = (o_m < M)[:, None] & (tile * 128 + o_n < N)[None, :]
        if PDL:
            gdc_wait()
        acc = tl.load(p_part + (2 * i - 1) * BLOCK_M * 128 + o, mask=mask)
        for j in range(i, tl.cdiv(start + blocks, share)):
            acc += tl.load(p_part + 2 * j * BLOCK_M * 128 + o, mask=mask)
        o_out = o_m.to(tl.int64)[:, None] * N + (tile * 128 + o_n)[None, :]
        tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=mask)
