"""The Hopper kernel of ``fp8_linear`` for few quantized rows: reading the weight is the limit, and never pauses.

    _fetch     one warp: blocks of 128 columns of x and of the weight, by TMA, as many stages ahead as memory holds
    _multiply  four warps, once or twice: 64 rows of x by 128 rows of the weight

The blocks of all tiles form one line, tile after tile, and each of the programs, one an SM, takes an equal stretch of
it: whatever the shape, all of them read to the end. (Osama et al., "Stream-K", arXiv 2301.03598, cut products like
that.) Who has the end of a tile stores its result, and adds what the programs before it have summed of it. A program
does what others wait for first, so that nobody waits long:

    stretch   ├─ end of a tile ─┼─ whole tiles ─┼─ beginning of a tile ─┤
    in order         third           second               first

Products are those of ``hopper.py``: the tensor cores add up one block of 128 columns, and what they have summed is
multiplied with its two scales and added in float32.
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

from mlacompile.kernels.fp8_linear.hopper import BLOCK_K, ROWS, Room, _added, store_tile
from mlacompile.kernels.mla_decode.hopper_fetch import load_tile
from mlacompile.kernels.mla_decode.hopper_room import _here, _wait_for_earlier, all_warps

COLUMNS = gl.constexpr(128)  # of the result that a group of warps sums


@gluon.jit
def _borders(begin, end, blocks):
    """Where a stretch of the line is cut: where its first whole tile begins, and where its last tile does if that goes
    on in another stretch."""
    tail = gl.maximum(end // blocks * blocks, begin)
    return gl.minimum((begin + blocks - 1) // blocks * blocks, tail), tail


@gluon.jit
def _fetch(room, d_x, d_w, d_w2, begin, end, blocks, N1, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
           STAGES: gl.constexpr, TWO: gl.constexpr):  # fmt: skip
    """Copies the blocks of a stretch, each as soon as all groups have multiplied what its stage held before."""
    head, tail = _borders(begin, end, blocks)
    for g in range(end - begin):
        at = gl.where(g < end - tail, tail + g, head + g - (end - tail))
        at = gl.where(g < end - head, at, begin + g - (end - head))
        stage = g % STAGES
        mbarrier.wait(room.empty.index(stage), ((g // STAGES) & 1) ^ 1)
        full = room.full.index(stage)
        mbarrier.expect(full, (BLOCK_M + BLOCK_N) * BLOCK_K)
        row = at // blocks * BLOCK_N
        if TWO and row >= N1:
            load_tile(d_w2, [row - N1, at % blocks * BLOCK_K], full, room.w.index(stage))
        else:
            load_tile(d_w, [row, at % blocks * BLOCK_K], full, room.w.index(stage))
        load_tile(d_x, [0, at % blocks * BLOCK_K], full, room.x.index(stage))


@gluon.jit
def _scales(p_x_descale, p_descale, o_x, o_w, k, stride_xsk):
    """Of block k: those of the thread's rows of x, times that of the weight."""
    return gl.load(p_x_descale + (o_x + k * stride_xsk)), gl.load(p_descale + (o_w + k))


@gluon.jit
def _piece(p_part, i, acc):
    """Where piece i is, for threads that have what acc has."""
    layout: gl.constexpr = acc.type.layout
    o_m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_n = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    return p_part + i * (ROWS * COLUMNS) + (o_m[:, None] * COLUMNS + o_n[None, :])


@gluon.jit
def _raised(p_flag):
    """Whether a flag is raised. What was written before that can be read then."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [p_flag.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _hand_over(acc, p_part, p_flag, i, live):
    """Store piece i and raise its flag."""
    gl.store(_piece(p_part, i, acc), acc, mask=live[:, None])
    all_warps()
    gl.atomic_xchg(p_flag + i, 1, sem="release", scope="gpu")


@gluon.jit
def _collected(acc, p_part, p_flag, i, live):
    """acc and piece i. Takes its flag down: for the next launch it is as it was."""
    while _raised(p_flag + i) == 0:
        pass
    acc += gl.load(_piece(p_part, i, acc), mask=live[:, None], other=0.0)
    all_warps()
    gl.store(p_flag + i, 0)
    return acc


@gluon.jit
def _multiply(room, d_out, p_part, p_flag, p_x_descale, p_descale, p_descale2, begin, end, blocks, share, M, N, N1,
              stride_xsm, stride_xsk, stride_sn, stride_sn2, UPPER: gl.constexpr, LEFT: gl.constexpr,
              GROUP: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
              TWO: gl.constexpr):  # fmt: skip
    """64 rows from UPPER by 128 columns from LEFT of each tile. Scales are read two blocks ahead."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 32]
    )
    never = M < 0  # the compiler must not know: so a product stays in the registers of the one before
    block = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    out = room.out.index(GROUP)
    o_row = UPPER + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_x = gl.minimum(o_row, M - 1) * stride_xsm
    o_zero = _here(o_row) // (2 * ROWS + UPPER)  # or one register would get the scale, and products wait behind it
    head, tail = _borders(begin, end, blocks)
    g = 0
    for turn in range(3):
        at = gl.where(turn == 0, tail, gl.where(turn == 1, head, begin))
        stop = gl.where(turn == 0, end, gl.where(turn == 1, tail, head))
        while at < stop:
            tile = at // blocks
            first = at % blocks
            last = gl.minimum(first + stop - at, blocks) - 1
            row = gl.minimum(tile * BLOCK_N + LEFT, N - 1)  # of the weight
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
                    room.x.index(stage).slice(UPPER, ROWS, dim=0),
                    room.w.index(stage).slice(LEFT, COLUMNS, dim=0).permute((1, 0)),
                    block, use_acc=never, is_async=True,
                )  # fmt: skip
                factor = x_scale * w_scale
                x_scale = x_next
                w_scale = w_next
                x_next, w_next = _scales(p_x_descale, p_w, o_x, o_w, gl.minimum(k + 2, last), stride_xsk)
                block = warpgroup_mma_wait(0, deps=(block,))
                mbarrier.arrive(room.empty.index(stage), count=1)
                acc = _added(acc, block, factor)
                g += 1
            if last + 1 < blocks:
                _hand_over(acc, p_part, p_flag, gl.program_id(0) * GROUPS + GROUP, o_row < M)
            else:
                for i in range((at - first) // share, gl.where(first > 0, gl.program_id(0), 0)):
                    acc = _collected(acc, p_part, p_flag, i * GROUPS + GROUP, o_row < M)
                tma.store_wait(0)
                out.store(acc.to(out.dtype))
                fence_async_shared()
                store_tile(d_out, [UPPER, tile * BLOCK_N + LEFT], out)
            at += last + 1 - first
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "share"])
def _fp8_stream_kernel(
    d_x, p_x_descale, d_w, p_descale, d_w2, p_descale2, d_out, p_part, p_flag, M, N, N1, K, stride_xsm, stride_xsk,
    stride_sn, stride_sn2, share, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    REGS: gl.constexpr, TWO: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (programs,), each with ``share`` blocks of the line. A program waits for programs before it only, which are
    on the device by then: they are started in order.

    d_x, d_w: descriptors of [M, K], M at most BLOCK_M, and [N, K]; what is beyond is read as zeros. TWO: weight rows
    from N1 on, a multiple of BLOCK_N, are those of a second weight. d_out: of [M, N], in boxes of 64 rows by 128.
    p_part: float32 [programs, groups, 64, 128]. p_flag: int32 [programs, groups], zeros, which are zeros again
    afterwards; nobody else may use them at the same time. BLOCK_M: 64 or 128. BLOCK_N: 128, or 256 with 64 rows.
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
    begin = gl.program_id(0) * share
    end = gl.minimum(begin + share, gl.cdiv(N, BLOCK_N) * blocks)
    _wait_for_earlier()
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (room, d_out, p_part, p_flag, p_x_descale, p_descale, p_descale2, begin, end, blocks, share,
                             M, N, N1, stride_xsm, stride_xsk, stride_sn, stride_sn2, 0, 0, 0, GROUPS, BLOCK_N, STAGES,
                             TWO)),
                (_fetch, (room, d_x, d_w, d_w2, begin, end, blocks, N1, BLOCK_M, BLOCK_N, STAGES, TWO)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (room, d_out, p_part, p_flag, p_x_descale, p_descale, p_descale2, begin, end, blocks, share,
                             M, N, N1, stride_xsm, stride_xsk, stride_sn, stride_sn2, 0, 0, 0, GROUPS, BLOCK_N, STAGES,
                             TWO)),
                (_multiply, (room, d_out, p_part, p_flag, p_x_descale, p_descale, p_descale2, begin, end, blocks, share,
                             M, N, N1, stride_xsm, stride_xsk, stride_sn, stride_sn2, BLOCK_M - ROWS,
                             BLOCK_N - COLUMNS, 1, GROUPS, BLOCK_N, STAGES, TWO)),
                (_fetch, (room, d_x, d_w, d_w2, begin, end, blocks, N1, BLOCK_M, BLOCK_N, STAGES, TWO)),
            ],
            [4, 1],
            [REGS, 24],
        )  # fmt: skip
