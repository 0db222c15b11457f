"""The room that a program of the Hopper kernels works in: its shared memory and its barriers."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# No "from __future__ import annotations": the fields of an aggregate are types, not strings.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mlacompile.kernels.hopper import aggregate
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK

ROWS = gl.constexpr(64)  # rows of a tile: what one wgmma takes


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
    """Barriers. The first ten exist once a stage; the others are waited for once a block or once a work item."""

    first_full: gl.shared_memory_descriptor  # first quarter and rotary keys have arrived
    left_full: gl.shared_memory_descriptor
    last_full: gl.shared_memory_descriptor
    late_full: gl.shared_memory_descriptor  # the second half of the left columns, if it comes and goes by itself
    first_empty: gl.shared_memory_descriptor
    left_empty: gl.shared_memory_descriptor
    last_empty: gl.shared_memory_descriptor
    late_empty: gl.shared_memory_descriptor
    alpha: gl.shared_memory_descriptor  # alpha of a block is published
    scores: gl.shared_memory_descriptor  # the scores of the next block are computed, or there is none
    p_full: gl.shared_memory_descriptor
    p_empty: gl.shared_memory_descriptor
    queries: gl.shared_memory_descriptor  # _right has stored its part of an item's queries
    total: gl.shared_memory_descriptor  # an item's denominators are published

    @gluon.constexpr_function
    def __init__(self, first_full, left_full, last_full, late_full, first_empty, left_empty, last_empty, late_empty,
                 alpha, scores, p_full, p_empty, queries, total):  # fmt: skip
        self.first_full, self.left_full = first_full, left_full
        self.last_full, self.late_full = last_full, late_full
        self.first_empty, self.left_empty = first_empty, left_empty
        self.last_empty, self.late_empty = last_empty, late_empty
        self.alpha, self.scores, self.p_full, self.p_empty = alpha, scores, p_full, p_empty
        self.queries, self.total = queries, total


@aggregate
class Parts:
    """Barriers of the parts of a stage, once a stage each."""

    first: gl.shared_memory_descriptor
    left: gl.shared_memory_descriptor
    last: gl.shared_memory_descriptor
    late: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, first, left, last, late):
        self.first, self.left, self.last, self.late = first, left, last, late


@gluon.jit
def _barriers(N: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    if N > 1:
        return bars
    else:
        return bars.index(0)


@gluon.jit
def _setup(dtype: gl.constexpr, rope_dtype: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr,
           PANEL: gl.constexpr, BLOCK_P: gl.constexpr, HALVES: gl.constexpr):  # fmt: skip
    """Shared memory and barriers of a program. Rotary keys and their queries may be of another 16 bits."""
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * PANEL, element_bitwidth=16, rank=2)
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    NARROW: gl.constexpr = BLOCK_P if BLOCK_P > 0 else 16
    narrow: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * NARROW, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x = Tiles(
        gl.allocate_shared_memory(dtype, [ROWS, LEFT], wide),
        gl.allocate_shared_memory(dtype, [2, ROWS, QUARTER], wide),
        gl.allocate_shared_memory(rope_dtype, [ROWS, NARROW], narrow),
        gl.allocate_shared_memory(dtype, [2, BLOCK, LEFT], wide),
        gl.allocate_shared_memory(dtype, [4, BLOCK, QUARTER], wide),
        gl.allocate_shared_memory(rope_dtype, [2, BLOCK, NARROW], narrow),
        gl.allocate_shared_memory(dtype, [ROWS, BLOCK], square),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], plain),
        gl.allocate_shared_memory(gl.float32, [ROWS], plain),
    )
    first_full, left_full, last_full = _barriers(2), _barriers(2), _barriers(2)
    first_empty, left_empty, last_empty = _barriers(2), _barriers(2), _barriers(2)
    late_full, late_empty = left_full, left_empty
    if HALVES:
        late_full, late_empty = _barriers(2), _barriers(2)
    bar = Signals(
        first_full, left_full, last_full, late_full, first_empty, left_empty, last_empty, late_empty, _barriers(2),
        _barriers(2), _barriers(1), _barriers(1), _barriers(1), _barriers(1),
    )  # fmt: skip
    fence_async_shared()
    return x, bar
