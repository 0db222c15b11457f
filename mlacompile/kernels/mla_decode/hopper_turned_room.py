"""Shared memory and barriers of ``hopper_turned.py``."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# No "from __future__ import annotations": the fields of an aggregate are types, not strings.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from mlacompile.kernels.hopper import aggregate
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_room import ROWS, _barriers

GROUP = gl.constexpr(128)  # columns of a latent that share a factor, if there are several
FACTORS = gl.constexpr(4)  # of a token in shared memory, if there are several
PLACES = gl.constexpr(4)  # for factors of one block each, which are used longer than its latents
COARSE_BLOCKS = gl.constexpr(1024)  # at most so many are added up in FP8 products, whose sum drops what is small in it


@aggregate
class TurnedTiles:
    """Shared memory."""

    q: gl.shared_memory_descriptor  # [1 or 2, 64 or 128, WIDTH] e4m3: queries rounded, and what that leaves
    q_pe: gl.shared_memory_descriptor  # [64, BLOCK_P]
    k: gl.shared_memory_descriptor  # [STAGES, 64, WIDTH] e4m3
    pe: gl.shared_memory_descriptor  # [STAGES, 64, BLOCK_P]
    factors: gl.shared_memory_descriptor  # [PLACES, 64], several a token: [PLACES, 64, FACTORS]
    p: gl.shared_memory_descriptor  # [2, 64, 64] float16, the softmax's numerators times the factors; see _room_of_p
    alpha: gl.shared_memory_descriptor  # [2, 64], factors by which earlier output shrinks
    row_scale: gl.shared_memory_descriptor  # [64], powers of two by which the queries were divided
    tile_scale: gl.shared_memory_descriptor  # [1], the largest of them, where those are float16 and count from it
    share: gl.shared_memory_descriptor  # [64], 1 / the softmax's denominators
    m: gl.shared_memory_descriptor  # [3, 64], what exponents of a block count from, for the other group; zeros
    others: gl.shared_memory_descriptor  # [2, 64], denominators of the other group, and what they count from
    p_last: gl.shared_memory_descriptor  # [2, 64, 32], the second half of P where that has only 32 columns
    largest: gl.shared_memory_descriptor  # [PLACES, 64], what P is multiplied with, a factor or the largest
    rise: gl.shared_memory_descriptor  # [2, 64], by how much rows of a group's block count from more than before
    most: gl.shared_memory_descriptor  # [2, 4, 32], the largest of rows, of warps of both groups, in words of two
    shares: gl.shared_memory_descriptor  # [PLACES, FACTORS, 64] float16, what groups of columns have of that

    @gluon.constexpr_function
    def __init__(
        self,
        q,
        q_pe,
        k,
        pe,
        factors,
        p,
        alpha,
        row_scale,
        tile_scale,
        share,
        m,
        others,
        p_last,
        largest,
        rise,
        most,
        shares,
    ):
        self.q, self.q_pe, self.k, self.pe, self.factors = q, q_pe, k, pe, factors
        self.p, self.alpha, self.row_scale, self.tile_scale, self.share = p, alpha, row_scale, tile_scale, share
        self.m, self.others, self.p_last = m, others, p_last
        self.largest, self.rise, self.most, self.shares = largest, rise, most, shares


@aggregate
class TurnedSignals:
    """Barriers: of each stage, of each of two blocks' P, and once a work item."""

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor  # by _values, who need the P that _scores publish when they are done with it
    p_full: gl.shared_memory_descriptor
    p_empty: gl.shared_memory_descriptor
    queries: gl.shared_memory_descriptor
    total: gl.shared_memory_descriptor
    rows: gl.shared_memory_descriptor  # an item's rows have left shared memory, where there are two partitions _values
    m: gl.shared_memory_descriptor  # what a block's exponents count from, and alpha, where two take blocks by turns
    others: gl.shared_memory_descriptor  # an item's denominators of the group whose block is not the last
    turn: gl.shared_memory_descriptor  # products of a block's scores are issued: with one factor a token, by turns

    @gluon.constexpr_function
    def __init__(self, full, empty, p_full, p_empty, queries, total, rows, m, others, turn):
        self.full, self.empty, self.p_full, self.p_empty = full, empty, p_full, p_empty
        self.queries, self.total, self.rows = queries, total, rows
        self.m, self.others, self.turn = m, others, turn


@gluon.constexpr_function
def _sides(groups, stacked):
    """Partitions ``_values``. Eight warps have one P on the right, and a group of 128 columns is work for four."""
    return 2 if groups > 1 and stacked else 1


@gluon.constexpr_function
def _is_weighed(groups, stacked):
    """Whether P of some rows is e4m3 and of others float16, whose blocks take longer."""
    return groups == 1 and not stacked


@gluon.constexpr_function
def _parts_apart(shape):
    """Whether both parts of queries of that shape have sums of their own: they are one tile of 128 rows."""
    return shape[1] > ROWS


@gluon.constexpr_function
def _tile_rows(stacked):
    """Rows (query, head) of a tile: both parts of their queries are as many as one wgmma takes, or each is."""
    return 32 if stacked else 64


@gluon.constexpr_function
def _fragment(columns, warps, depth=16):
    """The layout of a product's so many columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, depth])


@gluon.jit
def _room_of_p(q, GROUPS: gl.constexpr, STACKED: gl.constexpr, APART: gl.constexpr):
    """Two blocks' P. With several factors a token each group has one if STACKED, [2, groups * 32, 64], and they lie
    where the queries were, which are held in registers by then: so there is room for a fourth stage."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    if GROUPS > 1 and STACKED:
        return q._reinterpret(gl.float16, [2, q.shape[2] // 4, BLOCK], layout)
    elif not (STACKED or APART):  # half of it: the other is elsewhere, so that a store does not wait for the one before
        half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
        return gl.allocate_shared_memory(gl.float16, [2, ROWS, BLOCK // 2], half)
    else:
        return gl.allocate_shared_memory(gl.float16, [2, ROWS, BLOCK], layout)


@gluon.jit
def _is_coarse(lo, hi, n, coarse_from, GROUPS: gl.constexpr):
    """Whether P of an item of n blocks is e4m3: its row sees many tokens, and the item not too many of them. With
    several factors a token values are converted in any case."""
    if GROUPS == 1:
        return (hi - lo >= coarse_from) & (n <= COARSE_BLOCKS)
    else:
        return hi != hi  # the compiler sees that nothing is


@gluon.jit
def _coarse_half(p, buffer):
    """Half of a block's P as e4m3, in the room of that in float16."""
    half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=8, rank=2)
    return p._reinterpret(gl.float8e4nv, [4, ROWS, BLOCK // 2], half).index(2 * buffer)


@gluon.jit
def _coarse(p, buffer, dtype: gl.constexpr):
    """A block's P in e4m3, or pairs of that as one number, in the room of that in float16."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=BITS, rank=2)
    return p._reinterpret(dtype, [4, ROWS, 8 * BLOCK // BITS], layout).index(2 * buffer)


@gluon.jit
def _room_of_factors(GROUPS: gl.constexpr):
    """As TMA writes them, so that they begin where it can write."""
    if GROUPS > 1:
        several: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        return gl.allocate_shared_memory(gl.float32, [PLACES, BLOCK, FACTORS], several)
    else:
        one: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
        return gl.allocate_shared_memory(gl.float32, [PLACES, BLOCK], one)


@gluon.jit
def _turned_setup(dtype: gl.constexpr, STACKED: gl.constexpr, APART: gl.constexpr, WIDTH: gl.constexpr,
                  BLOCK_P: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr):  # fmt: skip
    bytes_: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    ROPE: gl.constexpr = BLOCK_P if BLOCK_P > 0 else 16
    rope: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * ROPE, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # One tile of all rounded rows and behind them what that leaves, if APART, and two tiles if not.
    SHAPE: gl.constexpr = [1, 2 * ROWS, WIDTH] if APART else [1 if STACKED else 2, ROWS, WIDTH]
    q = gl.allocate_shared_memory(gl.float8e4nv, SHAPE, bytes_)
    alpha = gl.allocate_shared_memory(gl.float32, [2, ROWS], plain)
    p = _room_of_p(q, GROUPS, STACKED, APART)
    m, rise, most, others, p_last = alpha, alpha, alpha, alpha, p
    if not STACKED:
        if not APART:
            p_last = _room_of_p(q, GROUPS, STACKED, APART)
        m = gl.allocate_shared_memory(gl.float32, [3 if APART else 2, ROWS], plain)
        if APART:
            m.index(2).store(gl.zeros((ROWS,), gl.float32, gl.BlockedLayout([1], [32], [4], [0])))
            rise = gl.allocate_shared_memory(gl.float32, [2, ROWS], plain)
            most = gl.allocate_shared_memory(gl.int32, [2, 4, ROWS // 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        others = gl.allocate_shared_memory(gl.float32, [2, ROWS], plain)
    factors = _room_of_factors(GROUPS)
    largest, shares = factors, factors
    KIND: gl.constexpr = gl.float16 if APART else gl.float32
    row_scale = gl.allocate_shared_memory(KIND, [ROWS], plain)
    tile_scale = row_scale
    if APART:
        tile_scale = gl.allocate_shared_memory(gl.float32, [1], plain)
    if not STACKED and GROUPS > 1:
        largest = gl.allocate_shared_memory(gl.float32, [PLACES, BLOCK], plain)
        lines: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        shares = gl.allocate_shared_memory(gl.float16, [PLACES, FACTORS, BLOCK], lines)
    x = TurnedTiles(
        q,
        gl.allocate_shared_memory(dtype, [ROWS, ROPE], rope),
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK, WIDTH], bytes_),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK, ROPE], rope),
        factors,
        p,
        alpha,
        row_scale,
        tile_scale,
        gl.allocate_shared_memory(gl.float32, [ROWS], plain),
        m,
        others,
        p_last,
        largest,
        rise,
        most,
        shares,
    )
    SIDES: gl.constexpr = _sides(GROUPS, STACKED)
    full, empty = _barriers(STAGES), _barriers(STAGES, SIDES)
    p_full, p_empty = _barriers(2), _barriers(2, SIDES)
    queries, total = _barriers(1 if STACKED else 2, SIDES), _barriers(1)
    rows, m_full, others_full, turn = total, total, total, total
    if SIDES > 1:
        rows = _barriers(1, SIDES)
    if not STACKED:
        m_full, others_full, turn = _barriers(2), _barriers(1), _barriers(2)
    bar = TurnedSignals(full, empty, p_full, p_empty, queries, total, rows, m_full, others_full, turn)
    fence_async_shared()
    return x, bar
