"""The Hopper kernel of ``fp8_linear`` for few quantized rows: reading the weight is the limit, and never pauses.

    _fetch     one warp: blocks of 128 columns of x and of the weight, by TMA, as many stages ahead as memory holds
    _multiply  four warps, twice: half of the tile's columns, or with more than 64 rows of x half of its rows

A program, one an SM, best has one tile of the result, or of one part of K, and reads to the end as all others do. So
there must be about as many tiles as SMs, whatever N is, and they must be wide: x is read once a tile, through the same
L2. Hence a tile is one or two *blocks* of 128 rows of the weight and a *strip* of up to 64 more. Strips are cut from
the rows that blocks leave over, so that each lies in one block of scales, too:

    rows of the weight    │ tile 0        │ tile 1        │ …  │ tile n        │ 0 │ 1 │ … │ n │
                           2 · 128 rows    2 · 128 rows                          strips

Products are those of ``hopper.py``: the tensor cores add up one block of 128 columns, and what they have summed is
multiplied with its two scales and added in float32. Where rows of x come without the root of their norm
(``fp8_normed``), it is a factor of the whole sum.
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

from mlacompile.kernels.fp8_linear.hopper import BLOCK_K, ROWS, _added
from mlacompile.kernels.hopper import _here, _launch_later, _wait_for_earlier, aggregate, load_tile, store_tile

COLUMNS = gl.constexpr(128)  # of the result: rows of the weight that make a block
BURST = gl.constexpr(2)  # blocks that are sent for at once: 256 bytes of a row, one behind the other
FETCH_REGS = gl.constexpr(40)


@aggregate
class Room:
    """Shared memory and barriers of a program."""

    x: gl.shared_memory_descriptor  # [STAGES, BLOCK_M, 128]
    w: gl.shared_memory_descriptor  # [STAGES * BLOCKS, 128, 128]
    strip: gl.shared_memory_descriptor  # [STAGES, STRIP, 128]
    out: gl.shared_memory_descriptor  # [2, 64, columns of a group of the blocks]
    side: gl.shared_memory_descriptor  # [2, 64, columns of a group of the strip]
    full: gl.shared_memory_descriptor  # [STAGES, 1]
    empty: gl.shared_memory_descriptor  # [STAGES, 1]

    @gluon.constexpr_function
    def __init__(self, x, w, strip, out, side, full, empty):
        self.x, self.w, self.strip, self.out, self.side = x, w, strip, out, side
        self.full, self.empty = full, empty


@aggregate
class Work:
    """How all work is divided: tiles along N, times parts of K of so many blocks, of so many in all."""

    tiles: gl.tensor
    blocks: gl.tensor
    blocks_a_part: gl.tensor
    items: gl.tensor

    @gluon.constexpr_function
    def __init__(self, tiles, blocks, blocks_a_part, items):
        self.tiles, self.blocks, self.blocks_a_part, self.items = tiles, blocks, blocks_a_part, items


@gluon.jit
def _item(work, i, BLOCKS: gl.constexpr, STRIP: gl.constexpr):
    """Item i: the first rows of its blocks and of its strip, its part of K, and the blocks [first, end) of that."""
    tile = i % work.tiles
    part = i // work.tiles
    first = part * work.blocks_a_part
    row = tile * (BLOCKS * COLUMNS)
    side = work.tiles * (BLOCKS * COLUMNS) + tile * STRIP
    return row, side, part, first, gl.minimum(first + work.blocks_a_part, work.blocks)


@gluon.jit
def _load_rows(d_w, d_w2, row, column, N1, full, to, TWO: gl.constexpr):
    """Rows of the weight, or with TWO from row N1 on those of the second."""
    if TWO and row >= N1:
        load_tile(d_w2, [row - N1, column], full, to)
    else:
        load_tile(d_w, [row, column], full, to)


@gluon.jit
def _fetch(room, work, d_x, d_w, d_w2, d_strip, d_strip2, N1, BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr,
           STRIP: gl.constexpr, STAGES: gl.constexpr, TWO: gl.constexpr):  # fmt: skip
    """Copies block after block, two at a time, as soon as both groups have multiplied what their stages held.

    Of the same rows both are sent for one after the other, as they lie in memory: 128 bytes of a row by themselves are
    read more slowly.
    """
    g = 0
    for i in range(gl.program_id(0), work.items, gl.num_programs(0)):
        row, side, _part, first, end = _item(work, i, BLOCKS, STRIP)
        for k in range(first, end, BURST):
            for ahead in gl.static_range(BURST):
                if k + ahead < end:
                    stage = (g + ahead) % STAGES
                    mbarrier.wait(room.empty.index(stage), (((g + ahead) // STAGES) & 1) ^ 1)
                    mbarrier.expect(room.full.index(stage), (BLOCK_M + BLOCKS * COLUMNS + STRIP) * BLOCK_K)
            for j in gl.static_range(BLOCKS):
                for ahead in gl.static_range(BURST):
                    if k + ahead < end:
                        stage = (g + ahead) % STAGES
                        full, to = room.full.index(stage), room.w.index(stage * BLOCKS + j)
                        _load_rows(d_w, d_w2, row + j * COLUMNS, (k + ahead) * BLOCK_K, N1, full, to, TWO)
            for ahead in gl.static_range(BURST):
                if k + ahead < end:
                    stage = (g + ahead) % STAGES
                    full, column = room.full.index(stage), (k + ahead) * BLOCK_K
                    if STRIP > 0:
                        _load_rows(d_strip, d_strip2, side, column, N1, full, room.strip.index(stage), TWO)
                    load_tile(d_x, [0, column], full, room.x.index(stage))
            g += gl.minimum(end - k, BURST)


@gluon.jit
def _scales_of(p_descale, p_descale2, row, N, N1, stride_sn, stride_sn2, TWO: gl.constexpr):
    """Where the scales of the block with a row of the weight are, kept inside it."""
    row = gl.minimum(row, N - 1)
    p = p_descale + row // BLOCK_K * stride_sn
    if TWO and row >= N1:
        p = p_descale2 + (row - N1) // BLOCK_K * stride_sn2
    return p


@gluon.jit
def _scales(p_x_descale, p_w, p_side, o_x, o_w, k, stride_xsk):
    """Of block k of K: those of the thread's rows of x, that of the block of the weight, and that of the strip's."""
    return gl.load(p_x_descale + (o_x + k * stride_xsk)), gl.load(p_w + (o_w + k)), gl.load(p_side + (o_w + k))


@gluon.jit
def _roots(p_squares, o_row, M, K, eps, STRETCHES: gl.constexpr):
    """1 / √(mean square + eps) of rows of x, from sums over stretches of them."""
    p = p_squares + gl.minimum(o_row, M - 1) * STRETCHES
    total = gl.load(p)
    for i in gl.static_range(1, STRETCHES):
        total += gl.load(p + i)
    return gl.rsqrt(total / K + eps)


@gluon.jit
def _product(x, w, acc, never):
    """Begins a product. never: false, but the compiler must not know; so it stays in the registers of the last one."""
    return warpgroup_mma(x, w.permute((1, 0)), acc, use_acc=never, is_async=True)


@gluon.jit
def _leave(acc, out, d_out, p_part, part, o_row, row, column, M, N):
    """Store a group's sums: in float32, a part of the result, or by TMA, which leaves out what is beyond the edges."""
    if p_part is not None:
        o_n = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        at = p_part + part.to(gl.int64) * M * N + (o_row[:, None] * N + o_n[None, :])
        gl.store(at, acc, mask=(o_row < M)[:, None] & (o_n < N)[None, :])
    else:
        out.store(acc.to(out.dtype))
        fence_async_shared()
        store_tile(d_out, [row, column], out)


@gluon.jit
def _multiply(room, work, d_out, d_side, p_part, p_squares, eps, p_x_descale, p_descale, p_descale2, M, N, N1, K,
              stride_xsm, stride_xsk, stride_sn, stride_sn2, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
              BLOCKS: gl.constexpr, STRIP: gl.constexpr, STAGES: gl.constexpr, TWO: gl.constexpr,
              STRETCHES: gl.constexpr):  # fmt: skip
    """What group GROUP, 0 or 1, has of the tile: WIDE columns of a block, from LEFT on, NARROW of the strip, from SIDE
    on, by 64 rows of x, from UPPER on. Scales are read two blocks ahead."""
    HALF: gl.constexpr = BLOCK_M // ROWS == 1  # of the columns; else of the rows
    WIDE: gl.constexpr = COLUMNS if BLOCKS == 2 or not HALF else COLUMNS // 2
    NARROW: gl.constexpr = STRIP // 2 if HALF else STRIP
    UPPER: gl.constexpr = 0 if HALF else GROUP * ROWS
    BLOCK: gl.constexpr = GROUP * (BLOCKS - 1)  # which of the tile's
    LEFT: gl.constexpr = GROUP * WIDE if HALF and BLOCKS == 1 else 0
    SIDE: gl.constexpr = GROUP * NARROW if HALF else 0
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 32])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NARROW if STRIP > 0 else 8, 32]
    )
    never = M < 0
    o_row = UPPER + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    o_x = gl.minimum(o_row, M - 1) * stride_xsm
    o_zero = _here(o_row) // (3 * ROWS)  # or one register would get the scale, and products wait behind it
    block = gl.zeros((ROWS, WIDE), gl.float32, wide)
    if STRIP > 0:
        side_block = gl.zeros((ROWS, NARROW), gl.float32, narrow)
    if STRETCHES > 0:
        root = _roots(p_squares, o_row, M, K, eps, STRETCHES)
    g = 0
    for i in range(gl.program_id(0), work.items, gl.num_programs(0)):
        row, side, part, first, end = _item(work, i, BLOCKS, STRIP)
        row += BLOCK * COLUMNS
        p_w = _scales_of(p_descale, p_descale2, row, N, N1, stride_sn, stride_sn2, TWO)
        p_side = p_w
        if STRIP > 0:
            p_side = _scales_of(p_descale, p_descale2, side, N, N1, stride_sn, stride_sn2, TWO)
            side_acc = gl.zeros((ROWS, NARROW), gl.float32, narrow)
        acc = gl.zeros((ROWS, WIDE), gl.float32, wide)
        x_scale, w_scale, side_scale = _scales(p_x_descale, p_w, p_side, o_x, o_zero, first, stride_xsk)
        later = gl.minimum(first + 1, end - 1)
        x_next, w_next, side_next = _scales(p_x_descale, p_w, p_side, o_x, o_zero, later, stride_xsk)
        for k in range(first, end):
            stage = g % STAGES
            mbarrier.wait(room.full.index(stage), (g // STAGES) & 1)
            x = room.x.index(stage).slice(UPPER, ROWS, dim=0)
            block = _product(x, room.w.index(stage * BLOCKS + BLOCK).slice(LEFT, WIDE, dim=0), block, never)
            if STRIP > 0:
                side_block = _product(x, room.strip.index(stage).slice(SIDE, NARROW, dim=0), side_block, never)
            factor = x_scale * w_scale
            side_factor = x_scale * side_scale
            x_scale = x_next
            w_scale = w_next
            side_scale = side_next
            later = gl.minimum(k + 2, end - 1)
            x_next, w_next, side_next = _scales(p_x_descale, p_w, p_side, o_x, o_zero, later, stride_xsk)
            if STRIP > 0:
                block, side_block = warpgroup_mma_wait(0, deps=(block, side_block))
            else:
                block = warpgroup_mma_wait(0, deps=(block,))
            mbarrier.arrive(room.empty.index(stage), count=1)
            acc = _added(acc, block, factor)
            if STRIP > 0:
                side_acc = _added(side_acc, side_block, gl.convert_layout(side_factor, gl.SliceLayout(1, narrow)))
            g += 1
        if STRETCHES > 0:
            acc = acc * root[:, None]
            if STRIP > 0:
                side_acc = side_acc * gl.convert_layout(root, gl.SliceLayout(1, narrow))[:, None]
        if p_part is None:
            tma.store_wait(0)  # what the item before has left
        _leave(acc, room.out.index(GROUP), d_out, p_part, part, o_row, UPPER, row + LEFT, M, N)
        if STRIP > 0:
            o_side = gl.convert_layout(o_row, gl.SliceLayout(1, narrow))
            _leave(side_acc, room.side.index(GROUP), d_side, p_part, part, o_side, UPPER, side + SIDE, M, N)
    _launch_later()
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "tiles", "blocks_a_part", "items"])
def _fp8_stream_kernel(
    d_x, p_x_descale, d_w, p_descale, d_w2, p_descale2, d_strip, d_strip2, d_out, d_side, p_part, p_squares, eps, M, N,
    N1, K, stride_xsm, stride_xsk, stride_sn, stride_sn2, tiles, blocks_a_part, items, BLOCK_M: gl.constexpr,
    BLOCKS: gl.constexpr, STRIP: gl.constexpr, STAGES: gl.constexpr, REGS: gl.constexpr, TWO: gl.constexpr,
    STRETCHES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (programs,), which take the items, tiles times parts of K, by turns.

    d_x, d_w: descriptors of [M, K], M at most BLOCK_M, 64 or 128, and of [N, K]; what is beyond is read as zeros.
    d_strip: of the same weight, in boxes of STRIP rows. TWO: weight rows from N1 on, a multiple of 128, are those of a
    second weight. d_out, d_side: of [M, N], in boxes of what a group has of the blocks and of the strip. p_part:
    float32 [parts, M, N], and no d_out then; or None. p_squares: [M, STRETCHES], the squares of rows whose norm is left
    to this kernel, summed over stretches of them; or None.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    x = gl.allocate_shared_memory(d_x.dtype, [STAGES, BLOCK_M, BLOCK_K], d_x.layout)
    w = gl.allocate_shared_memory(d_w.dtype, [STAGES * BLOCKS, COLUMNS, BLOCK_K], d_w.layout)
    strip, out, side = w, w, w
    if STRIP > 0:
        strip = gl.allocate_shared_memory(d_w.dtype, [STAGES, STRIP, BLOCK_K], d_strip.layout)
    if p_part is None:
        out = gl.allocate_shared_memory(d_out.dtype, [2, ROWS, d_out.block_type.shape[1]], d_out.layout)
        if STRIP > 0:
            side = gl.allocate_shared_memory(d_side.dtype, [2, ROWS, d_side.block_type.shape[1]], d_side.layout)
    room = Room(x, w, strip, out, side, full, empty)
    fence_async_shared()
    work = Work(tiles, gl.cdiv(K, BLOCK_K), blocks_a_part, items)
    _wait_for_earlier()
    gl.warp_specialize(
        [
            (_multiply, (room, work, d_out, d_side, p_part, p_squares, eps, p_x_descale, p_descale, p_descale2, M, N,
                         N1, K, stride_xsm, stride_xsk, stride_sn, stride_sn2, 0, BLOCK_M, BLOCKS, STRIP, STAGES, TWO,
                         STRETCHES)),
            (_multiply, (room, work, d_out, d_side, p_part, p_squares, eps, p_x_descale, p_descale, p_descale2, M, N,
                         N1, K, stride_xsm, stride_xsk, stride_sn, stride_sn2, 1, BLOCK_M, BLOCKS, STRIP, STAGES, TWO,
                         STRETCHES)),
            (_fetch, (room, work, d_x, d_w, d_w2, d_strip, d_strip2, N1, BLOCK_M, BLOCKS, STRIP, STAGES, TWO)),
        ],
        [4, 1],
        [REGS, FETCH_REGS],
    )  # fmt: skip
