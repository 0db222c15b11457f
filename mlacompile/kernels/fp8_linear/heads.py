"""The Hopper kernel for a weight of each head and few rows: all that a head's weight is comes at once.

    program   a head: up to 64 rows of x, in 16 bits, by its [N, K] of the weight, in e4m3
    blocks    of 128 × 128, in order, each with a scale:   W ─► 16 bits ─► W·xᵀ ─► · scale ─► added to the block before
              while the tensor cores multiply one, the next is widened

The weight is the left factor, from registers, and x is read from shared memory as it came. A head of latent attention,
128 by 512, is 64 KB, and x beside it 16 or 64: so nothing waits for room, and a program has all of its memory on the
way before the first block is there. Results leave through shared memory, as rows.

Where a product in FP8 comes behind it, the 128 results that a row has of a head are a group, and can leave quantized.
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

from mlacompile.kernels.fp8_linear.hopper import BLOCK_K, ROWS
from mlacompile.kernels.hopper import (
    _drop,
    _launch_later,
    _wait_for_earlier,
    aggregate,
    all_warps,
    load_tile,
    store_tile,
)

BLOCK_N = gl.constexpr(128)  # rows of the weight that share scales
WARPS = gl.constexpr(8)
LINE = gl.constexpr(128)  # bytes
LARGEST = gl.constexpr(448.0)
SMALLEST = gl.constexpr(2.0**-126)


@aggregate
class Head:
    """Shared memory and barriers of a program: block i of the weight comes with block i of x, if x has as many."""

    x: gl.shared_memory_descriptor  # [K / 128, 1, 64, 128]
    w: gl.shared_memory_descriptor  # [blocks, 1, 128, 128]
    out: gl.shared_memory_descriptor  # [N / 128, 1, 64, 128]
    full: gl.shared_memory_descriptor  # [blocks, 1]

    @gluon.constexpr_function
    def __init__(self, x, w, out, full):
        self.x, self.w, self.out, self.full = x, w, out, full


@gluon.jit
def _head_room(d_x, d_w, N: gl.constexpr, K: gl.constexpr):
    BLOCKS: gl.constexpr = (N // BLOCK_N) * (K // BLOCK_K)
    full = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BLOCKS):
        mbarrier.init(full.index(i), count=1)
    x = gl.allocate_shared_memory(d_x.dtype, [K // BLOCK_K, 1, ROWS, BLOCK_K], d_x.layout)
    w = gl.allocate_shared_memory(d_w.dtype, [BLOCKS, 1, BLOCK_N, BLOCK_K], d_w.layout)
    out = gl.allocate_shared_memory(d_x.dtype, [N // BLOCK_N, 1, ROWS, BLOCK_N], d_x.layout)
    fence_async_shared()
    return Head(x, w, out, full)


@gluon.jit
def _send_for(head, d_x, d_w, h, N: gl.constexpr, K: gl.constexpr):
    """Ask for all blocks of head h."""
    BLOCKS_K: gl.constexpr = K // BLOCK_K
    for i in gl.static_range((N // BLOCK_N) * BLOCKS_K):
        full = head.full.index(i)
        column = i % BLOCKS_K * BLOCK_K
        mbarrier.expect(full, BLOCK_N * BLOCK_K + (2 * ROWS * BLOCK_K if i < BLOCKS_K else 0))
        load_tile(d_w, [h, i // BLOCKS_K * BLOCK_N, column], full, head.w.index(i))
        if i < BLOCKS_K:
            load_tile(d_x, [h, 0, column], full, head.x.index(i))


@gluon.jit
def _block(blocks, i):
    """Block i, of one head, as a matrix."""
    return blocks.index(i).reshape((blocks.shape[2], blocks.shape[3]))


@gluon.jit
def _widened(w, layout: gl.constexpr, dtype: gl.constexpr):
    """A block of the weight as a left factor. By way of float32: a direct cast from float16 to bfloat16 is slow."""
    half = w.load(gl.DotOperandLayout(0, layout, 2)).to(gl.float16)
    if dtype == gl.float16:
        return half
    else:
        return half.to(gl.float32).to(dtype)


@gluon.jit
def _multiply_head(head, d_out, p_q, p_q_descale, p_spent, p_descale, h, M, stride_xm, stride_dn, groups,
                   N: gl.constexpr, K: gl.constexpr):  # fmt: skip
    """The products of head h, eight warps: by TMA, or quantized. p_spent: the head's rows of x, or None."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, ROWS, 16]
    )
    BLOCKS_K: gl.constexpr = K // BLOCK_K
    BLOCKS: gl.constexpr = (N // BLOCK_N) * BLOCKS_K
    acc = gl.zeros((BLOCK_N, ROWS), gl.float32, layout)
    mbarrier.wait(head.full.index(0), 0)
    left = _widened(_block(head.w, 0), layout, head.x.dtype)
    for i in gl.static_range(BLOCKS):
        zero = gl.zeros((BLOCK_N, ROWS), gl.float32, layout)
        right = _block(head.x, i % BLOCKS_K).permute((1, 0))
        block = warpgroup_mma(left, right, zero, use_acc=False, is_async=True)
        factor = gl.load(p_descale + (i // BLOCKS_K * stride_dn + i % BLOCKS_K))
        if i + 1 < BLOCKS:
            mbarrier.wait(head.full.index(i + 1), 0)
            left = _widened(_block(head.w, i + 1), layout, head.x.dtype)
        elif p_spent is not None:  # all of it has come
            _drop_rows(p_spent, stride_xm, M, K)
        block = warpgroup_mma_wait(0, deps=(block,))
        if i % BLOCKS_K == 0:
            acc = block * factor
        else:
            acc += block * factor
        if i % BLOCKS_K == BLOCKS_K - 1:
            out = _block(head.out, i // BLOCKS_K)
            out.permute((1, 0)).store(acc.to(out.dtype))
            if p_q is None:
                fence_async_shared()
                store_tile(d_out, [h, 0, i // BLOCKS_K * BLOCK_N], head.out.index(i // BLOCKS_K))
            else:
                all_warps()
                _leave_quantized(out, p_q, p_q_descale, h * (N // BLOCK_N) + i // BLOCKS_K, M, groups)
    tma.store_wait(0)


@gluon.jit
def _leave_quantized(out, p_q, p_q_descale, group, M, groups):
    """Store rows of a group of results in e4m3, and their scales, as ``quantize_rows`` does."""
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, rows)
    y = out.load(rows).to(gl.float32)
    o_m = gl.arange(0, ROWS, by_row)
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, rows))
    peak = gl.max(gl.abs(y), 1)
    largest = gl.full((ROWS,), LARGEST, gl.float32, by_row)
    descale = gl.where(peak == 0, 1.0, gl.maximum(gl.div_rn(peak, largest), SMALLEST))
    odd = gl.max(((y != y) | (gl.abs(y) == float("inf"))).to(gl.int32), 1)
    descale = gl.where(odd > 0, float("nan"), descale)
    q = y * gl.div_rn(gl.full((ROWS,), 1.0, gl.float32, by_row), descale)[:, None]
    q = gl.minimum(gl.maximum(q, -LARGEST), LARGEST)
    o_row = o_m.to(gl.int64) * groups + group
    at = o_row[:, None] * BLOCK_N + o_n[None, :]
    gl.store(p_q + at, q.to(p_q.dtype.element_ty), mask=(o_m < M)[:, None])
    gl.store(p_q_descale + o_row, descale, mask=o_m < M)


@gluon.jit
def _drop_rows(p_x, stride_xm, M, K: gl.constexpr):
    """Drop rows of K values in 16 bits, whole lines, which have been read."""
    LINES: gl.constexpr = 2 * K // LINE
    o = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    for first in gl.static_range(0, ROWS * LINES, 32 * WARPS):
        row = (first + o) // LINES
        _drop(p_x + (row.to(gl.int64) * stride_xm + (first + o) % LINES * (LINE // 2)), row < M)


@gluon.jit
def _fp8_heads_kernel(
    d_x, d_w, p_descale, d_out, p_q, p_q_descale, p_spent, M, stride_xh, stride_xm, stride_dh, stride_dn, groups,
    N: gl.constexpr, K: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (heads,).

    d_x, d_w, d_out: descriptors of [heads, M, K], [heads, N, K] and [heads, M, N], M at most 64; what is beyond is read
    as zeros and not written. N, K: in whole blocks. p_descale: [heads, N / 128, K / 128]. p_q, p_q_descale: of [M,
    groups, 128] and [M, groups], and no d_out then; or None. p_spent: x, which nobody reads again; or None.
    """
    head = _head_room(d_x, d_w, N, K)
    h = gl.program_id(0)
    _launch_later()
    _wait_for_earlier()
    _send_for(head, d_x, d_w, h, N, K)
    p_descale += h * stride_dh
    if p_spent is not None:
        p_spent += h.to(gl.int64) * stride_xh
    _multiply_head(head, d_out, p_q, p_q_descale, p_spent, p_descale, h, M, stride_xm, stride_dn, groups, N, K)
