"""Scores and softmax of ``hopper_turned.py`` with more than 32 rows: both parts of a query are tiles of their own.

A product is not begun for nothing: the tensor cores queue a few, and then the warps that issue more of them stand
still. So the scores of the next block are issued in pieces, 128 columns of one part of the queries each, and the
softmax of this block runs in between, a quarter of its tokens at a time.

The maximum that exponents count from is only moved when a row exceeds it by 2^SLACK. Earlier output then need not be
multiplied for most blocks, and ``_values`` skip it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlacompile.kernels.mla_decode.hopper import LOWEST
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_room import ROWS, _here, _launch_later
from mlacompile.kernels.mla_decode.hopper_rows import _limits, _seen
from mlacompile.kernels.mla_decode.hopper_turned_scores import (
    _add_rope,
    _fp8_products,
    _live_factors,
    _products,
    _report,
    _unit_of_p,
)

SLACK = gl.constexpr(6)  # powers of two by which a row may exceed its maximum before that moves
PANEL = gl.constexpr(128)  # columns of a piece
QUARTER = gl.constexpr(16)  # tokens


@gluon.constexpr_function
def _narrow(columns):
    """The layout of so many columns of scores, in the registers that they have among all of them."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _piece(x, stage, s, i, WIDTH: gl.constexpr):
    """Issues piece i of a stage's scores: the small part of the queries first, it is added up more precisely."""
    PIECES: gl.constexpr = WIDTH // PANEL
    zero = _here(gl.to_tensor(0))  # or the addresses of both parts of the queries would be kept in registers
    columns: gl.constexpr = i % PIECES * PANEL
    q = x.q.index(zero + (1 - i // PIECES)).slice(columns, PANEL, dim=1)
    keys = x.k.index(stage).slice(columns, PANEL, dim=1).permute((1, 0))
    return warpgroup_mma(q, keys, s, use_acc=i > 0, is_async=True)


@gluon.jit
def _pieces(x, stage, s, first: gl.constexpr, end: gl.constexpr, MORE: gl.constexpr, WIDTH: gl.constexpr):
    """Issues pieces [first, end), if there are MORE blocks."""
    if MORE:
        for i in gl.static_range(first, end):
            s = _piece(x, stage, s, i, WIDTH)
    return s


@gluon.jit
def _halves(s):
    """Columns of scores, the first half and the second, each where it was."""
    columns: gl.constexpr = s.shape[1] // 2
    first, second = gl.split(s.reshape([ROWS, 2, columns]).permute((0, 2, 1)))
    layout: gl.constexpr = _narrow(columns)
    first = gl.convert_layout(first, layout, assert_trivial=True)
    return first, gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def _joined(first, second):
    """The opposite of ``_halves``."""
    columns: gl.constexpr = 2 * first.shape[1]
    both = gl.join(first, second).permute((0, 2, 1)).reshape([ROWS, columns])
    return gl.convert_layout(both, _narrow(columns), assert_trivial=True)


@gluon.jit
def _weighed(x, e, stage, i: gl.constexpr, t, lo, hi):
    """A quarter of P: exponentials times the factors of their tokens."""
    quarter: gl.constexpr = _narrow(QUARTER)
    some = x.factors.index(stage).slice(i * QUARTER, QUARTER, dim=0)
    factors = _live_factors(some, t + i * QUARTER, lo, hi, gl.SliceLayout(0, quarter))
    return (e * factors[None, :]).to(gl.float16)


@gluon.jit
def _unit_of_block(x, stage, t, lo, hi):
    """The exponent of the unit of a block's P. Every warp looks at all factors, so none waits for another."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    factors = _live_factors(x.factors.index(stage), t, lo, hi, layout)
    largest = gl.max(factors.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # magnitudes are in the order of their bits
    return _unit_of_p(largest.to(gl.float32, bitcast=True)) + SLACK


@gluon.jit
def _scores_of_block(x, s, stage, t, lo, hi, BLOCK_P: gl.constexpr):
    """Waits for the scores of a stage's latents, begins to add the rotary ones, and the unit of the block's P."""
    unit = _unit_of_block(x, stage, t, lo, hi)
    factors = x.factors.index(stage).load(gl.SliceLayout(0, _fp8_products()))
    s = warpgroup_mma_wait(0, deps=(s,))
    return _add_rope(x, x.q_pe, s, factors, stage, BLOCK_P, _products()), unit


@gluon.jit
def _publish_pieces(x, bar, s, m, total, row_scale, unit, b, stage, ahead, s_next, t, lo, hi, sure, limit,
                    CAUSAL: gl.constexpr, MORE: gl.constexpr, WIDTH: gl.constexpr):  # fmt: skip
    """Softmax of block b, whose rotary scores were issued, between the pieces of the next block's if there are MORE.

    Stores P and alpha for ``_values``. Returns the running maximum, sums of the tokens of each
    column of a quarter, and the next scores, all of them issued.
    """
    layout: gl.constexpr = _products()
    PIECES: gl.constexpr = 2 * WIDTH // PANEL
    BEFORE: gl.constexpr = PIECES // 2 - 1  # pieces that are issued before the exponentials
    quarter: gl.constexpr = _narrow(QUARTER)
    if MORE:
        s_next = _piece(x, ahead, s_next, 0, WIDTH)
        s = warpgroup_mma_wait(1, deps=(s,))
    else:
        s = warpgroup_mma_wait(0, deps=(s,))
    s = _seen(s, t, lo, hi, sure, limit, CAUSAL, layout)
    s_next = _pieces(x, ahead, s_next, 1, BEFORE, MORE, WIDTH)
    highest = gl.max(s, 1) * row_scale + unit
    m_new = gl.where(highest > m + SLACK, highest, m)
    alpha = gl.exp2(m - m_new)
    buffer = b & 1
    mbarrier.wait(bar.p_empty.index(buffer), ((b >> 1) & 1) ^ 1)
    x.alpha.index(buffer).store(alpha)
    total = total * gl.convert_layout(alpha, gl.SliceLayout(1, quarter), assert_trivial=True)[:, None]
    left, right = _halves(s)
    s0, s1 = _halves(left)
    s2, s3 = _halves(right)
    exponent = gl.convert_layout(m_new, gl.SliceLayout(1, quarter), assert_trivial=True)[:, None]
    scale = gl.convert_layout(row_scale, gl.SliceLayout(1, quarter), assert_trivial=True)[:, None]
    e0 = gl.exp2(s0 * scale - exponent)
    s_next = _pieces(x, ahead, s_next, BEFORE, BEFORE + 1, MORE, WIDTH)
    e1 = gl.exp2(s1 * scale - exponent)
    s_next = _pieces(x, ahead, s_next, BEFORE + 1, BEFORE + 2, MORE, WIDTH)
    sums = e0 + e1
    p01 = _joined(_weighed(x, e0, stage, 0, t, lo, hi), _weighed(x, e1, stage, 1, t, lo, hi))
    e2 = gl.exp2(s2 * scale - exponent)
    s_next = _pieces(x, ahead, s_next, BEFORE + 2, PIECES - 1, MORE, WIDTH)
    e3 = gl.exp2(s3 * scale - exponent)
    sums += e2 + e3
    p23 = _joined(_weighed(x, e2, stage, 2, t, lo, hi), _weighed(x, e3, stage, 3, t, lo, hi))
    s_next = _pieces(x, ahead, s_next, PIECES - 1, PIECES, MORE, WIDTH)
    x.p.index(buffer).store(gl.convert_layout(_joined(p01, p23), layout, assert_trivial=True))
    fence_async_shared()
    mbarrier.arrive(bar.p_full.index(buffer), count=1)
    return m_new, total + sums, s_next


@gluon.jit
def _scores_in_pieces(x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B,
                      i_tile, n_tiles, scale_log2, H, S, T, WIDTH: gl.constexpr, BLOCK_P: gl.constexpr,
                      STAGES: gl.constexpr, CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """Scores and softmax of every block."""
    layout: gl.constexpr = _products()
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    PIECES: gl.constexpr = 2 * WIDTH // PANEL
    s0 = gl.zeros((ROWS, BLOCK), gl.float32, _fp8_products())
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, end, t, n, skip, rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        limit, sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, ROWS)
        m = gl.full((ROWS,), LOWEST, gl.float32, by_row)
        total = gl.zeros((ROWS, QUARTER), gl.float32, _narrow(QUARTER))

        mbarrier.wait(bar.queries, item & 1)
        row_scale = x.row_scale.load(by_row) * scale_log2
        stage = g % STAGES
        mbarrier.wait(bar.full.index(stage), (g // STAGES) & 1)
        s_next = _piece(x, stage, s0, 0, WIDTH)
        for i in gl.static_range(1, PIECES):
            s_next = _piece(x, stage, s_next, i, WIDTH)
        for _ in range(n - 1):
            s, unit = _scores_of_block(x, s_next, stage, t, lo, hi, BLOCK_P)
            ahead = (g + 1) % STAGES
            mbarrier.wait(bar.full.index(ahead), ((g + 1) // STAGES) & 1)
            m, total, s_next = _publish_pieces(x, bar, s, m, total, row_scale, unit, g, stage, ahead, s_next, t, lo, hi,
                                               sure, limit, CAUSAL, True, WIDTH)  # fmt: skip
            stage = ahead
            t += BLOCK
            g += 1
        if (row + 1 >= B) | (todo - taken <= overhead):
            _launch_later()
        s, unit = _scores_of_block(x, s_next, stage, t, lo, hi, BLOCK_P)
        m, total, _none = _publish_pieces(x, bar, s, m, total, row_scale, unit, g, stage, stage, s_next, t, lo, hi,
                                           sure, limit, CAUSAL, False, WIDTH)  # fmt: skip
        total = gl.convert_layout(gl.sum(total, 1), by_row)
        _report(
            x, bar, m, total, p_lse, p_part_lse, p_parts, part, row, skip, rest, share, i_tile, n_tiles, H, S, by_row,
            ROWS, ONE_QUERY,
        )  # fmt: skip
        g += 1
        item += 1
        todo -= taken
        row += 1
        position = 0
