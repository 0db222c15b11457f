"""The Hopper kernel of ``fp8_linear`` for few quantized rows: reading the weight is the limit, and never pauses.

    _fetch     one warp: blocks of 128 columns of x and of the weight, by TMA, as many stages ahead as memory holds
    _multiply  four warps, once or twice: 64 rows of x by 128 rows of the weight

The blocks of all tiles form one line, tile after tile, and each of the programs, one an SM, takes an equal stretch of
it: whatever the shape, all of them read to the end. (Osama et al., "Stream-K", arXiv 2301.03598, cut products like
that.) A tile that is whole in a stretch is stored as it is. Of one that is cut each program stores what it has summed,
in float32, and ``_fp8_cut_kernel`` adds the pieces, in order.

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

COLUMNS = gl.constexpr(128)  # of the result that a group of warps sums


@gluon.jit
def _fetch(room, d_x, d_w, begin, end, blocks, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Copies the blocks from begin to end of the line, each as soon as all groups have multiplied what its stage held."""
    tile = begin // blocks
    k = begin % blocks
    for g in range(end - begin):
        stage = g % STAGES
        mbarrier.wait(room.empty.index(stage), ((g // STAGES) & 1) ^ 1)
        full = room.full.index(stage)
        mbarrier.expect(full, (BLOCK_M + BLOCK_N) * BLOCK_K)
        load_tile(d_w, [tile * BLOCK_N, k * BLOCK_K], full, room.w.index(stage))
        load_tile(d_x, [0, k * BLOCK_K], full, room.x.index(stage))
        k += 1
        if k == blocks:
            k = 0
            tile += 1


@gluon.jit
def _scales(p_x_descale, p_descale, o_x, o_w, k, stride_xsk):
    """Of block k: those of the thread's rows of x, times that of the weight."""
    return gl.load(p_x_descale + (o_x + k * stride_xsk)), gl.load(p_descale + (o_w + k))


@gluon.jit
def _leave(acc, out, d_out, p_part, piece, whole, o_row, tile, M, N, UPPER: gl.constexpr, LEFT: gl.constexpr,
           BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """Store a whole tile's sums by TMA, which leaves out what is beyond the edges, or a piece of them, in float32."""
    if whole:
        tma.store_wait(0)
        out.store(acc.to(out.dtype))
        fence_async_shared()
        store_tile(d_out, [UPPER, tile * BLOCK_N + LEFT], out)
    elif p_part is not None:
        o_n = LEFT + gl.arange(0, COLUMNS, gl.SliceLayout(0, acc.type.layout))
        o_piece = (piece * BLOCK_M + o_row)[:, None] * BLOCK_N + o_n[None, :]
        gl.store(p_part + o_piece, acc, mask=(o_row < M)[:, None] & (tile * BLOCK_N + o_n < N)[None, :])


@gluon.jit
def _multiply(room, d_out, p_part, p_x_descale, p_descale, begin, end, blocks, slot, M, N, stride_xsm, stride_xsk,
              stride_sn, UPPER: gl.constexpr, LEFT: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
              BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """64 rows from UPPER by 128 columns from LEFT of each tile. Scales are read two blocks ahead.

    slot: where pieces of tiles go in p_part, [programs, 2, BLOCK_M, BLOCK_N]: the end of a tile in the first of two,
    its beginning in the second.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 32]
    )
    never = M < 0  # the compiler must not know: so a product stays in the registers of the one before
    block = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    out = room.out.index(GROUP)
    o_row = UPPER + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_x = gl.minimum(o_row, M - 1) * stride_xsm
    o_zero = _here(o_row) // (2 * ROWS + UPPER)  # or one register would get the scale, and products wait behind it
    g = 0
    at = begin
    while at < end:
        tile = at // blocks
        first = at % blocks
        last = gl.minimum(first + end - at, blocks) - 1
        o_w = o_zero + gl.minimum(tile * BLOCK_N + LEFT, N - 1) // BLOCK_K * stride_sn
        x_scale, w_scale = _scales(p_x_descale, p_descale, o_x, o_w, first, stride_xsk)
        x_next, w_next = _scales(p_x_descale, p_descale, o_x, o_w, gl.minimum(first + 1, last), stride_xsk)
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        for k in range(first, last + 1):
            stage = g % STAGES
            mbarrier.wait(room.full.index(stage), (g // STAGES) & 1)
            block = warpgroup_mma(
                room.x.index(stage).slice(UPPER, ROWS, dim=0),
                room.w.index(stage).slice(LEFT, COLUMNS, dim=0).permute((1, 0)),
                block, use_acc=never, is_async=True,
            )  # fmt: skip
            factor = x_scale * w_scale
            x_scale = x_next
            w_scale = w_next
            x_next, w_next = _scales(p_x_descale, p_descale, o_x, o_w, gl.minimum(k + 2, last), stride_xsk)
            block = warpgroup_mma_wait(0, deps=(block,))
            mbarrier.arrive(room.empty.index(stage), count=1)
            acc = _added(acc, block, factor)
            g += 1
        _leave(acc, out, d_out, p_part, 2 * slot + gl.where(first == 0, 1, 0), last + 1 - first == blocks, o_row, tile,
               M, N, UPPER, LEFT, BLOCK_M, BLOCK_N)  # fmt: skip
        at += last + 1 - first
    _launch_later()
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "share"])
def _fp8_stream_kernel(
    d_x, p_x_descale, d_w, p_descale, d_out, p_part, M, N, K, stride_xsm, stride_xsk, stride_sn, share,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (programs,), each with ``share`` blocks of the line. d_x, d_w: descriptors of [M, K] and [N, K], M at most
    BLOCK_M; beyond is read as zeros. d_out: of [M, N], in boxes of 64 rows by 128. p_part: float32 [programs, 2,
    BLOCK_M, BLOCK_N] if tiles are cut. BLOCK_M: 64 or 128. BLOCK_N: 128, or 256 with 64 rows.
    """
    GROUPS: gl.constexpr = BLOCK_M * BLOCK_N // (ROWS * COLUMNS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    room = Room(
        gl.allocate_shared_memory(d_x.dtype, [STAGES, BLOCK_M, BLOCK_K], d_x.layout),
        gl.allocate_shared_memory(d_w.dtype, [STAGES, BLOCK_N, BLOCK_K], d_w.layout),
        gl.allocate_shared_memory(d_out.dtype, [GROUPS, ROWS, COLUMNS], d_out.layout),
        full,
        empty,
    )
    fence_async_shared()
    blocks = gl.cdiv(K, BLOCK_K)
    slot = gl.program_id(0)
    begin = slot * share
    end = gl.minimum(begin + share, gl.cdiv(N, BLOCK_N) * blocks)
    _wait_for_earlier()
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (room, d_out, p_part, p_x_descale, p_descale, begin, end, blocks, slot, M, N, stride_xsm, stride_xsk,
                             stride_sn, 0, 0, 0, BLOCK_M, BLOCK_N, STAGES)),
                (_fetch, (room, d_x, d_w, begin, end, blocks, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (room, d_out, p_part, p_x_descale, p_descale, begin, end, blocks, slot, M, N, stride_xsm, stride_xsk,
                             stride_sn, 0, 0, 0, BLOCK_M, BLOCK_N, STAGES)),
                (_multiply, (room, d_out, p_part, p_x_descale, p_descale, begin, end, blocks, slot, M, N, stride_xsm, stride_xsk,
                             stride_sn, BLOCK_M - ROWS, BLOCK_N - COLUMNS, 1, BLOCK_M, BLOCK_N, STAGES)),
                (_fetch, (room, d_x, d_w, begin, end, blocks, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [4, 1],
            [REGS, 24],
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "share"])
def _fp8_cut_kernel(
    p_part, p_out, M, N, K, share, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOME: tl.constexpr, PDL: tl.constexpr
):
    """Adds the pieces of every tile that is cut, SOME of its rows a program, in order.

    Grid: (programs that made them - 1, BLOCK_M / SOME). Program i has the tile in which the stretch of i + 1 begins, if
    it is the first that begins in it.
    """
    i = tl.program_id(0) + 1
    blocks = tl.cdiv(K, 128)
    tile = i * share // blocks
    start = tile * blocks
    o_m = tl.program_id(1) * SOME + tl.arange(0, SOME)
    o_n = tl.arange(0, BLOCK_N)
    if (i * share > start) & ((i - 1) * share <= start) & (tl.program_id(1) * SOME < M):
        p = p_part + o_m[:, None] * BLOCK_N + o_n[None, :]
        mask = (o_m < M)[:, None] & (tile * BLOCK_N + o_n < N)[None, :]
        if PDL:
            gdc_wait()
        acc = tl.load(p + (2 * i - 1) * BLOCK_M * BLOCK_N, mask=mask)
        for j in range(i, tl.cdiv(start + blocks, share)):
            acc += tl.load(p + 2 * j * BLOCK_M * BLOCK_N, mask=mask)
        o_out = o_m.to(tl.int64)[:, None] * N + (tile * BLOCK_N + o_n)[None, :]
        tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=mask)
