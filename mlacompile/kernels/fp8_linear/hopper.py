"""The Hopper kernel of ``fp8_linear`` for many quantized rows: tensor cores are the limit, and are kept busy.

    _fetch     one warp: blocks of 128 columns of x and of the weight, by TMA, into STAGES stages
    _multiply  four warps, twice: each half of the tile's rows, by all of its columns

One program an SM takes tiles by turns. As in arXiv 2412.19437, section 3.3.2, tensor cores add up one
block of 128 columns, and what they have summed is multiplied with its two scales and added in float32: they keep few
bits of a sum of FP8 products. While one group of warps adds, the tensor cores work for the other.

A tile of 256 × 128 is what registers hold: 128 sums a thread, and 64 of one block of 64 rows. It is what L2 can feed:
the larger a tile, the less it reads for its products.

The upper 64 rows of a group leave, through shared memory by TMA, while the tensor cores work on the last block of the
lower ones; the next item and its first scales are looked up then, and _fetch is a few blocks into it.
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

from mlacompile.kernels.hopper import _here, _launch_later, aggregate, load_tile, store_tile

BLOCK_K = gl.constexpr(128)  # columns that share scales
ROWS = gl.constexpr(64)  # of a product: what one wgmma takes


@aggregate
class Room:
    """Shared memory and barriers of a program."""

    x: gl.shared_memory_descriptor  # [STAGES, BLOCK_M, 128]
    w: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, 128]
    out: gl.shared_memory_descriptor  # [2, 64, BLOCK_N], one for each group of warps
    full: gl.shared_memory_descriptor  # [STAGES, 1]
    empty: gl.shared_memory_descriptor  # [STAGES, 1]

    @gluon.constexpr_function
    def __init__(self, x, w, out, full, empty):
        self.x, self.w, self.out, self.full, self.empty = x, w, out, full, empty


@aggregate
class Work:
    """How all work is divided. Numbers of tiles along M and N, blocks of K in all and of a part."""

    tiles_m: gl.tensor
    tiles_n: gl.tensor
    blocks: gl.tensor
    blocks_a_part: gl.tensor
    items: gl.tensor

    @gluon.constexpr_function
    def __init__(self, tiles_m, tiles_n, blocks, blocks_a_part, items):
        self.tiles_m, self.tiles_n, self.blocks = tiles_m, tiles_n, blocks
        self.blocks_a_part, self.items = blocks_a_part, items


@gluon.jit
def _item(work, i, BAND: gl.constexpr):
    """Tile (along M, along N), part of K and its blocks [first, end) of item i.

    Tiles are taken band by band, down the columns of bands of BAND tiles along M: what all programs work on at once is
    about as high as wide, and reads the fewest rows of x and of the weight.
    """
    tiles = work.tiles_m * work.tiles_n
    part = i // tiles
    i = i % tiles
    top = i // (BAND * work.tiles_n) * BAND
    height = gl.minimum(work.tiles_m - top, BAND)
    i -= top * work.tiles_n
    first = part * work.blocks_a_part
    return top + i % height, i // height, part, first, gl.minimum(first + work.blocks_a_part, work.blocks)


@gluon.jit
def _fetch(room, work, d_x, d_w, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
           BAND: gl.constexpr):  # fmt: skip
    """Copies block after block, as soon as both groups have multiplied what its stage held before."""
    g = 0
    for i in range(gl.program_id(0), work.items, gl.num_programs(0)):
        i_m, i_n, _part, first, end = _item(work, i, BAND)
        for k in range(first, end):
            stage = g % STAGES
            mbarrier.wait(room.empty.index(stage), ((g // STAGES) & 1) ^ 1)
            full = room.full.index(stage)
            mbarrier.expect(full, (BLOCK_M + BLOCK_N) * BLOCK_K)
            load_tile(d_w, [i_n * BLOCK_N, k * BLOCK_K], full, room.w.index(stage))
            load_tile(d_x, [i_m * BLOCK_M, k * BLOCK_K], full, room.x.index(stage))
            g += 1


@gluon.jit
def _product(room, stage, at, block, never):
    """Begins the product of one block: rows at … at + 63 of x by all columns of the tile.

    never: false, but the compiler must not know. So it takes the product to add to block, what was there before, and
    keeps it in the same registers; there are none for another.
    """
    left = room.x.index(stage).slice(at, ROWS, dim=0)
    return warpgroup_mma(left, room.w.index(stage).permute((1, 0)), block, use_acc=never, is_async=True)


@gluon.jit
def _added(acc, block, factor):
    """acc + block · factor, one factor a row. The compiler must not put it off until the next product has begun: that
    needs the registers."""
    block, factor = gl.broadcast(block, factor[:, None])
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,0", [block, factor, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _sent(acc, out, d_out, p_part, row, column, part, M, N, BLOCK_N: gl.constexpr):
    """Store 64 rows of a tile: as float32 if K is in parts, else by TMA, which leaves out what is beyond the edges."""
    if p_part is not None:
        o_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
        o_n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, acc.type.layout))
        at = p_part + (part.to(gl.int64) * M + o_m)[:, None] * N + o_n[None, :]
        gl.store(at, acc, mask=(o_m < M)[:, None] & (o_n < N)[None, :])
    else:
        tma.store_wait(0)
        out.store(acc.to(out.dtype))
        fence_async_shared()
        store_tile(d_out, [row, column], out)


@gluon.jit
def _begin(work, i, p_x_descale, p_descale, o_row, o_zero, M, stride_xsm, stride_xsk, stride_sn, UPPER: gl.constexpr,
           TWO: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BAND: gl.constexpr):  # fmt: skip
    """Item i: its place, where its scales are, and the first of them: of the upper and lower rows and of the weight."""
    i_m, i_n, part, first, _end = _item(work, i, BAND)
    row = i_m * BLOCK_M + UPPER
    column = i_n * BLOCK_N
    o_upper = gl.minimum(row + o_row, M - 1) * stride_xsm + first * stride_xsk
    o_lower = gl.minimum(row + ROWS + o_row, M - 1) * stride_xsm + first * stride_xsk
    o_w = o_zero + (column // BLOCK_K) * stride_sn + first
    w_scale = gl.load(p_descale + o_w)
    upper_scale = gl.load(p_x_descale + o_upper)
    lower_scale = upper_scale
    if TWO:
        lower_scale = gl.load(p_x_descale + o_lower)
    return row, column, part, o_upper, o_lower, o_w, upper_scale, lower_scale, w_scale


@gluon.jit
def _multiply(room, work, d_out, p_part, p_x_descale, p_descale, M, N, stride_xsm, stride_xsk, stride_sn,
              GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
              BAND: gl.constexpr):  # fmt: skip
    """Rows of group GROUP, 0 or 1, of every tile: BLOCK_M / 2, 64 at a time. Scales are read a block ahead."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32]
    )
    UPPER: gl.constexpr = GROUP * BLOCK_M // 2  # rows of the tile
    LOWER: gl.constexpr = UPPER + ROWS
    TWO: gl.constexpr = BLOCK_M == 4 * ROWS
    never = M < 0
    block = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
    out = room.out.index(GROUP)
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_zero = _here(o_row) // ROWS  # or one register would get the scale, and products wait behind it
    g = 0
    ahead_row, ahead_column, ahead_part, o_upper, o_lower, o_w, upper_scale, lower_scale, w_scale = _begin(
        work, gl.program_id(0), p_x_descale, p_descale, o_row, o_zero, M, stride_xsm, stride_xsk, stride_sn,
        UPPER, TWO, BLOCK_M, BLOCK_N, BAND,
    )  # fmt: skip
    for i in range(gl.program_id(0), work.items, gl.num_programs(0)):
        row = ahead_row
        column = ahead_column
        part = ahead_part
        upper = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
        lower = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
        # Triton 3.6 loses a number of blocks that is carried from item to item (its loop-aware CSE): it is found anew.
        first = part * work.blocks_a_part
        for _ in range(first + 1, gl.minimum(first + work.blocks_a_part, work.blocks)):
            stage = g % STAGES
            mbarrier.wait(room.full.index(stage), (g // STAGES) & 1)
            block = _product(room, stage, UPPER, block, never)
            upper_factor = upper_scale * w_scale
            lower_factor = lower_scale * w_scale
            o_w += 1
            o_upper += stride_xsk
            w_scale = gl.load(p_descale + o_w)
            upper_scale = gl.load(p_x_descale + o_upper)
            if TWO:
                o_lower += stride_xsk
                lower_scale = gl.load(p_x_descale + o_lower)
            block = warpgroup_mma_wait(0, deps=(block,))
            if TWO:
                upper = _added(upper, block, upper_factor)
                block = _product(room, stage, LOWER, block, never)
                block = warpgroup_mma_wait(0, deps=(block,))
                mbarrier.arrive(room.empty.index(stage), count=1)
                lower = _added(lower, block, lower_factor)
            else:
                mbarrier.arrive(room.empty.index(stage), count=1)
                upper = _added(upper, block, upper_factor)
            g += 1
        stage = g % STAGES
        mbarrier.wait(room.full.index(stage), (g // STAGES) & 1)
        block = _product(room, stage, UPPER, block, never)
        block = warpgroup_mma_wait(0, deps=(block,))
        if not TWO:
            mbarrier.arrive(room.empty.index(stage), count=1)
        upper = _added(upper, block, upper_scale * w_scale)
        lower_factor = lower_scale * w_scale
        if TWO:
            block = _product(room, stage, LOWER, block, never)
        # Where the next item is, and its first scales, while the tensor cores work.
        ahead_row, ahead_column, ahead_part, o_upper, o_lower, o_w, upper_scale, lower_scale, w_scale = _begin(
            work, gl.minimum(i + gl.num_programs(0), work.items - 1), p_x_descale, p_descale, o_row, o_zero,
            M, stride_xsm, stride_xsk, stride_sn, UPPER, TWO, BLOCK_M, BLOCK_N, BAND,
        )  # fmt: skip
        _sent(upper, out, d_out, p_part, row, column, part, M, N, BLOCK_N)
        if TWO:
            block = warpgroup_mma_wait(0, deps=(block,))
            mbarrier.arrive(room.empty.index(stage), count=1)
            lower = _added(lower, block, lower_factor)
            _sent(lower, out, d_out, p_part, row + ROWS, column, part, M, N, BLOCK_N)
        g += 1
    if p_part is not None:
        _launch_later()
    tma.store_wait(0)


@gluon.jit
def _room(d_x, d_w, d_out, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    room = Room(
        gl.allocate_shared_memory(d_x.dtype, [STAGES, BLOCK_M, BLOCK_K], d_x.layout),
        gl.allocate_shared_memory(d_w.dtype, [STAGES, BLOCK_N, BLOCK_K], d_w.layout),
        gl.allocate_shared_memory(d_out.dtype, [2, ROWS, BLOCK_N], d_out.layout),
        full,
        empty,
    )
    fence_async_shared()
    return room


@gluon.jit(do_not_specialize=["M", "blocks_a_part", "parts"])
def _fp8_hopper_kernel(
    d_x, p_x_descale, d_w, p_descale, d_out, p_part, M, N, K, stride_xsm, stride_xsk, stride_sn, blocks_a_part, parts,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, REGS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (as many programs as run at once,). d_x, d_w: descriptors of [M, K] and [N, K]; beyond is read as zeros.

    d_out: of [M, N], in boxes of 64 rows. p_part: float32 [parts, M, N] if K is in parts, each of blocks_a_part blocks
    of 128, else None. BLOCK_M: 128 or 256. BLOCK_N: up to 128.
    """
    room = _room(d_x, d_w, d_out, BLOCK_M, BLOCK_N, STAGES)
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    work = Work(tiles_m, tiles_n, gl.cdiv(K, BLOCK_K), blocks_a_part, tiles_m * tiles_n * parts)
    gl.warp_specialize(
        [
            (_multiply, (room, work, d_out, p_part, p_x_descale, p_descale, M, N, stride_xsm, stride_xsk, stride_sn, 0,
                         BLOCK_M, BLOCK_N, STAGES, BAND)),
            (_multiply, (room, work, d_out, p_part, p_x_descale, p_descale, M, N, stride_xsm, stride_xsk, stride_sn, 1,
                         BLOCK_M, BLOCK_N, STAGES, BAND)),
            (_fetch, (room, work, d_x, d_w, BLOCK_M, BLOCK_N, STAGES, BAND)),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip
