"""Scores and softmax of ``hopper_turned.py`` with up to 32 rows: both parts of their queries are rows of one tile."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlacompile.kernels.hopper import _launch_later
from mlacompile.kernels.mla_decode.hopper import LN2, LOWEST
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_rows import SLACK, _limits, _rows, _seen, _slot

HEADROOM = gl.constexpr(14)  # P reaches 2^14 at most: float16 then keeps 2^-28 of that in full precision
LEAST_FACTOR = gl.constexpr(1e-24)  # factors below count as this one: their sums without factor stay finite


@gluon.constexpr_function
def _products():
    """The layout of a product of keys in 16 bits, whose fragments are those of the products in FP8."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])


@gluon.constexpr_function
def _fp8_products():
    """The layout of a product of keys in FP8."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 32])


@gluon.constexpr_function
def _softmax_layout():
    """The layout of scores without the parts of queries, which each thread adds by itself."""
    columns, lanes = [[0, 1], [0, 8], [0, 16], [0, 32]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(columns, lanes, [[8, 0], [16, 0]], [], [ROWS // 2, BLOCK])


@gluon.jit
def _together(s):
    """Scores of rows, from the scores of both parts of their queries."""
    s = gl.sum(s.reshape([ROWS // 16, 2, 8, BLOCK]), 1).reshape([ROWS // 2, BLOCK])
    return gl.convert_layout(s, _softmax_layout(), assert_trivial=True)


@gluon.jit
def _row_scale(x):
    """The power of two that each row's queries were divided by: both parts of a query have the same one."""
    both = x.row_scale.load(gl.SliceLayout(1, _products()))
    one = gl.max(both.reshape([ROWS // 16, 2, 8]), 1).reshape([ROWS // 2])
    return gl.convert_layout(one, gl.SliceLayout(1, _softmax_layout()))


@gluon.jit
def _queries_of(x, first_layout: gl.constexpr, BLOCK_P: gl.constexpr):
    """Queries and their rotary parts as left operands of products, in registers."""
    q = x.q.index(0).load(gl.DotOperandLayout(0, first_layout, 4))
    if BLOCK_P > 0:
        return q, x.q_pe.load(gl.DotOperandLayout(0, _products(), 2))
    else:
        return q, q


@gluon.jit
def _key_scores(x, q, stage, s0):
    """Begins the scores of a stage's latents."""
    return warpgroup_mma(q, x.k.index(stage).permute((1, 0)), s0, use_acc=False, is_async=True)


@gluon.jit
def _add_rope(x, q_pe, s, factors, stage, BLOCK_P: gl.constexpr, layout: gl.constexpr):
    """Multiplies the scores of a stage's latents with the factors, and begins to add the rotary ones."""
    s = gl.convert_layout(s * factors[None, :], layout)
    if BLOCK_P > 0:
        s = warpgroup_mma(q_pe, x.pe.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _with_rope(x, q_pe, s, stage, BLOCK_P: gl.constexpr, layout: gl.constexpr):
    """Waits for the scores of a stage's latents, multiplies them with the factors, begins to add the rotary ones."""
    s = warpgroup_mma_wait(0, deps=(s,))
    factors = x.factors.index(stage).load(gl.SliceLayout(0, s.type.layout))
    return _add_rope(x, q_pe, s, factors, stage, BLOCK_P, layout)


@gluon.jit
def _unit_of_p(largest, room: gl.constexpr):
    """The exponent of the unit in which P reaches 2^room that is multiplied with factors up to ``largest``."""
    largest = gl.maximum(largest, LEAST_FACTOR)
    return ((largest.to(gl.int32, bitcast=True) >> 23) - (126 + room)).to(gl.float32)


@gluon.jit
def _live_factors(factors, t, lo, hi, layout: gl.constexpr):
    """Factors of the tokens from t on, 0 of those that nobody sees, which may be anything."""
    N: gl.constexpr = factors.shape[0]
    live = factors.load(layout)
    if (t < lo) | (t + N > hi):
        o_t = t + gl.arange(0, N, layout)
        live = gl.where((o_t >= lo) & (o_t < hi), live, 0.0)
    return live


@gluon.jit
def _unit_of_block(factors, t, lo, hi, room: gl.constexpr):
    """``_unit_of_p`` of a block. Every warp looks at all factors: none waits for another."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    live = _live_factors(factors, t, lo, hi, layout)
    largest = gl.max(live.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # magnitudes are in the order of their bits
    return _unit_of_p(largest.to(gl.float32, bitcast=True), room)


@gluon.constexpr_function
def _by_thread(rows):
    """The layout of what each thread sums up of so many rows: four of them share a row."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    if rows == 32:
        return gl.DistributedLinearLayout([], lanes, [[8, 0], [16, 0]], [], [rows, 4])
    return gl.DistributedLinearLayout([[8, 0]], lanes, [[16, 0], [32, 0]], [], [rows, 4])


@gluon.jit
def _of_thread(e):
    """Sums of a row's tokens, of each thread by itself."""
    rows: gl.constexpr = e.shape[0]
    e = gl.sum(gl.sum(e.reshape([rows, e.shape[1] // 8, 4, 2]), 3), 1)
    return gl.convert_layout(e, _by_thread(rows), assert_trivial=True)


@gluon.jit
def _publish(x, bar, s, m, total, row_scale, unit, b, stage, t, lo, hi, sure, limit, CAUSAL: gl.constexpr):
    """Softmax of block b: P and alpha for ``_values``. Returns what exponents count from, and the sums of each thread.

    The former is moved when a row exceeds it by 2^SLACK: for most blocks earlier output need not be multiplied.
    """
    layout: gl.constexpr = _softmax_layout()
    s = _seen(_together(s), t, lo, hi, sure, limit, CAUSAL, layout)
    highest = gl.max(s, 1) * row_scale + unit
    m_before = m
    m = gl.where(highest > m + SLACK, highest, m)
    alpha = gl.exp2(m_before - m)
    e = gl.exp2(s * row_scale[:, None] - m[:, None])
    factors = _live_factors(x.factors.index(stage), t, lo, hi, gl.SliceLayout(0, layout))
    buffer = b & 1
    mbarrier.wait(bar.p_empty.index(buffer), ((b >> 1) & 1) ^ 1)
    x.alpha.index(buffer).slice(0, s.shape[0], dim=0).store(alpha)
    x.p.index(buffer).slice(0, s.shape[0], dim=0).store((e * factors[None, :]).to(gl.float16))
    fence_async_shared()
    mbarrier.arrive(bar.p_full.index(buffer), count=1)
    by_thread: gl.constexpr = gl.SliceLayout(1, _by_thread(s.shape[0]))
    return m, total * gl.convert_layout(alpha, by_thread, assert_trivial=True)[:, None] + _of_thread(e)


@gluon.jit
def _report(x, bar, m, total, p_lse, p_part_lse, p_parts, part, row, skip, rest, share, i_tile, n_tiles, H, S,
            by_row: gl.constexpr, N: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """What is known of an item when its last P is published: 1 / denominators, log-sum-exp, parts of its row."""
    x.share.slice(0, N, dim=0).store(1.0 / gl.where(total == 0, 1.0, total))
    mbarrier.arrive(bar.total, count=1)
    r_row, r_h, r_s = _rows(i_tile, H, ONE_QUERY, by_row, N)
    lse = gl.where(total == 0, float("-inf"), m + gl.log2(total))
    if (skip == 0) & (rest == 0):
        o_lse = (row.to(gl.int64) * H + r_h) * S + r_s
        gl.store(p_lse + o_lse, lse * LN2, mask=r_row < H * S)
    else:
        gl.store(p_part_lse + _slot(part, skip) * n_tiles * N + r_row, lse, mask=r_row < H * S)
    if (skip == 0) & (i_tile == 0):
        gl.store(p_parts + 2 * row, part)
        gl.store(p_parts + 2 * row + 1, 1 + (rest + share - 1) // share)


@gluon.jit
def _scores(x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B, i_tile,
            n_tiles, scale_log2, H, S, T, BLOCK_P: gl.constexpr, STAGES: gl.constexpr,
            CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """Scores and softmax of every block. AHEAD: the scores of a block are begun before the softmax of the one before.

    That keeps the tensor cores busy. Without rotary keys ptxas sees a conflict in it, and would wait for every product.
    """
    AHEAD: gl.constexpr = BLOCK_P > 0
    first_layout: gl.constexpr = _fp8_products()
    layout: gl.constexpr = _products()
    by_row: gl.constexpr = gl.SliceLayout(1, _softmax_layout())
    N: gl.constexpr = ROWS // 2
    s0 = gl.zeros((ROWS, BLOCK), gl.float32, first_layout)
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, end, t, n, skip, rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        limit, sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, N)
        m = gl.full((N,), LOWEST, gl.float32, by_row)
        total = gl.zeros((N, 4), gl.float32, _by_thread(N))

        mbarrier.wait(bar.queries, item & 1)
        q, q_pe = _queries_of(x, first_layout, BLOCK_P)
        row_scale = _row_scale(x) * scale_log2
        stage = g % STAGES
        mbarrier.wait(bar.full.index(stage), (g // STAGES) & 1)
        s_next = _key_scores(x, q, stage, s0)
        for _ in range(n - 1):
            s = _with_rope(x, q_pe, s_next, stage, BLOCK_P, layout)
            ahead = (g + 1) % STAGES
            if AHEAD:
                mbarrier.wait(bar.full.index(ahead), ((g + 1) // STAGES) & 1)
                s_next = _key_scores(x, q, ahead, s0)
            unit = _unit_of_block(x.factors.index(stage), t, lo, hi, HEADROOM - SLACK)
            if AHEAD:
                s = warpgroup_mma_wait(1, deps=(s,))
            m, total = _publish(x, bar, s, m, total, row_scale, unit, g, stage, t, lo, hi, sure, limit, CAUSAL)
            if not AHEAD:
                mbarrier.wait(bar.full.index(ahead), ((g + 1) // STAGES) & 1)
                s_next = _key_scores(x, q, ahead, s0)
            stage = ahead
            t += BLOCK
            g += 1
        if (row + 1 >= B) | (todo - taken <= overhead):
            _launch_later()
        s = _with_rope(x, q_pe, s_next, stage, BLOCK_P, layout)
        unit = _unit_of_block(x.factors.index(stage), t, lo, hi, HEADROOM - SLACK)
        if AHEAD:
            s = warpgroup_mma_wait(0, deps=(s,))
        m, total = _publish(x, bar, s, m, total, row_scale, unit, g, stage, t, lo, hi, sure, limit, CAUSAL)
        total_of_rows = gl.convert_layout(gl.sum(total, 1), by_row)
        _report(
            x, bar, m, total_of_rows, p_lse, p_part_lse, p_parts, part, row, skip, rest, share, i_tile, n_tiles, H, S,
            by_row, N, ONE_QUERY,
        )  # fmt: skip
        g += 1
        item += 1
        todo -= taken
        row += 1
        position = 0
