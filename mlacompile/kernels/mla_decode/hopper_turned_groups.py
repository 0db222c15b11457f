"""Scores and softmax of ``hopper_turned.py`` on a cache with several factors a token, one for each 128 columns.

The scores of each group of columns are a product of their own, which its factors multiply in float32, both parts of a
query at once; the rotary scores are one more. Two products are in flight at any time, each in the registers of one
that has been added up, and the first two of a block are begun before the softmax of the block before. Each group has
its own P, with its factors, in units of the largest of all: ``_values`` multiplies each group's columns with its own.
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

from mlacompile.kernels.hopper import _launch_later
from mlacompile.kernels.mla_decode.hopper import LOWEST
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_rows import _limits, _softmax
from mlacompile.kernels.mla_decode.hopper_turned_room import FACTORS, GROUP
from mlacompile.kernels.mla_decode.hopper_turned_scores import (
    HEADROOM,
    _fp8_products,
    _products,
    _report,
    _row_scale,
    _softmax_layout,
    _together,
    _unit_of_p,
)


@gluon.constexpr_function
def _two_of_each():
    """Two factors of each token of which a thread has scores."""
    columns, lanes = [[0, 1], [1, 0], [8, 0], [16, 0], [32, 0]], [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(columns, lanes, [[0, 0], [0, 0]], [], [BLOCK, 2])


@gluon.jit
def _factors_of(x, stage, group: gl.constexpr):
    """The factors of a stage's tokens for a group of columns, and for the group behind it."""
    first, second = x.factors.index(stage).slice(group, 2, dim=1).load(_two_of_each()).split()
    layout: gl.constexpr = gl.SliceLayout(0, _softmax_layout())
    return (
        gl.convert_layout(first, layout, assert_trivial=True),
        gl.convert_layout(second, layout, assert_trivial=True),
    )


@gluon.jit
def _clear_dead_factors(x, stage, t, lo, hi):
    """Zero the factors of tokens that nobody sees, in shared memory: they may be anything."""
    layout: gl.constexpr = gl.BlockedLayout([2, FACTORS], [32, 1], [gl.num_warps(), 1], [1, 0])
    o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    here = x.factors.index(stage)
    here.store(gl.where(((o_t >= lo) & (o_t < hi))[:, None], here.load(layout), 0.0))


@gluon.jit
def _largest_factor(x, stage):
    """Of all tokens and groups. Every warp looks at all of them, so none waits for another."""
    layout: gl.constexpr = gl.BlockedLayout([2, FACTORS], [32, 1], [gl.num_warps(), 1], [1, 0])
    return gl.max(gl.max(gl.abs(x.factors.index(stage).load(layout)), 1), 0)


@gluon.jit
def _queries_of_groups(x, GROUPS: gl.constexpr, BLOCK_P: gl.constexpr):
    """Left operands of all products of a block, in registers: queries by groups of columns, then rotary ones."""
    layout: gl.constexpr = gl.DotOperandLayout(0, _fp8_products(), 4)
    parts = ()
    for k in gl.static_range(GROUPS):
        parts = parts + (x.q.index(0).slice(k * GROUP, GROUP, dim=1).load(layout),)  # type: ignore[assignment]
    if BLOCK_P > 0:
        parts = parts + (x.q_pe.load(gl.DotOperandLayout(0, _products(), 2)),)  # type: ignore[assignment]
    return parts


@gluon.jit
def _begin(x, parts, stage, k: gl.constexpr, product, never, GROUPS: gl.constexpr):
    """Begins a product of a stage's scores, in place of one that has been added up.

    never: false, but the compiler must not know. So it takes the product to add to the one before, and keeps it in the
    same registers; there are none for another.
    """
    if k < GROUPS:
        keys = x.k.index(stage).slice(k * GROUP, GROUP, dim=1)
    else:
        keys = x.pe.index(stage)
        product = gl.convert_layout(product, _products(), assert_trivial=True)
    return warpgroup_mma(parts[k], keys.permute((1, 0)), product, use_acc=never, is_async=True)


@gluon.jit
def _added(s, product, factors):
    """s and the scores of rows in a product, times the factors of its group."""
    return s + _together(product) * factors[None, :]


@gluon.jit
def _add_groups(x, parts, even, odd, stage, never, GROUPS: gl.constexpr, PRODUCTS: gl.constexpr):
    """Waits for all scores of a stage, of which two products have been begun, and adds them up.

    Returns the sums, the two products, whose registers are free, and the largest factor, found between two waits.
    """
    s = gl.zeros((ROWS // 2, BLOCK), gl.float32, _softmax_layout())
    largest = 0.0
    for k in gl.static_range(0, PRODUCTS, 2):
        if k < GROUPS:
            first, second = _factors_of(x, stage, k)
        if k == 0:  # both have ended under the softmax; ptxas does not count products that were begun a round before
            even, odd = warpgroup_mma_wait(0, deps=(even, odd))
        else:
            even = warpgroup_mma_wait(1 if k + 1 < PRODUCTS else 0, deps=(even,))
        if k < GROUPS:
            s = _added(s, even, first)
        else:
            s = s + _together(even)
        if k + 2 < PRODUCTS:
            even = _begin(x, parts, stage, k + 2, even, never, GROUPS)
        if k + 1 < PRODUCTS:
            if k > 0:
                odd = warpgroup_mma_wait(1 if k + 2 < PRODUCTS else 0, deps=(odd,))
            if k + 1 < GROUPS:
                s = _added(s, odd, second)
            else:
                s = s + _together(odd)
            if k + 3 < PRODUCTS:
                odd = _begin(x, parts, stage, k + 3, odd, never, GROUPS)
        if k == 0:
            largest = _largest_factor(x, stage)
    layout: gl.constexpr = _fp8_products()
    even = gl.convert_layout(even, layout, assert_trivial=True)
    return s, even, gl.convert_layout(odd, layout, assert_trivial=True), largest


@gluon.jit
def _above(a, b):
    """The rows of a, then those of b, in the same threads."""
    return gl.join(a, b).permute((2, 0, 1)).reshape([2 * a.shape[0], a.shape[1]])


@gluon.jit
def _p_of_two(x, e, stage, group: gl.constexpr):
    """P of a group, and below it that of the next."""
    first, second = _factors_of(x, stage, group)
    return _above((e * first[None, :]).to(gl.float16), (e * second[None, :]).to(gl.float16))


@gluon.jit
def _publish_groups(x, bar, s, largest, m, total, row_scale, b, stage, t, lo, hi, sure, limit, GROUPS: gl.constexpr,
                    CAUSAL: gl.constexpr):  # fmt: skip
    """Softmax of block b: stores P of each group and alpha for ``_values``, returns the running maximum and sum."""
    shift = _unit_of_p(largest, HEADROOM)
    s, m, alpha = _softmax(s, m - shift, t, lo, hi, sure, limit, row_scale, CAUSAL, _softmax_layout(), False)
    m = m + shift
    e = gl.exp2(s * row_scale[:, None] - m[:, None])
    buffer = b & 1
    mbarrier.wait(bar.p_empty.index(buffer), ((b >> 1) & 1) ^ 1)
    x.alpha.index(buffer).slice(0, ROWS // 2, dim=0).store(alpha)
    p = _p_of_two(x, e, stage, 0)
    if GROUPS > 2:
        p = _above(p, _p_of_two(x, e, stage, 2))
    x.p.index(buffer).store(p)  # at once: between two stores all warps would wait for each other
    fence_async_shared()
    mbarrier.arrive(bar.p_full.index(buffer), count=1)
    return m, total * alpha + gl.sum(e, 1)


@gluon.jit
def _scores_of_groups(x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B,
                      i_tile, n_tiles, scale_log2, H, S, T, GROUPS: gl.constexpr, BLOCK_P: gl.constexpr,
                      STAGES: gl.constexpr, CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr):  # fmt: skip
    """``_scores``, of stacked queries, where there are several factors a token."""
    PRODUCTS: gl.constexpr = GROUPS + (1 if BLOCK_P > 0 else 0)  # of a block
    by_row: gl.constexpr = gl.SliceLayout(1, _softmax_layout())
    N: gl.constexpr = ROWS // 2
    even = gl.zeros((ROWS, BLOCK), gl.float32, _fp8_products())
    odd = gl.zeros((ROWS, BLOCK), gl.float32, _fp8_products())
    never = H < 0
    g = 0
    item = 0
    todo = share
    while (row < B) & (todo > overhead):
        lo, hi, end, t, n, skip, rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        limit, sure = _limits(i_tile, H, S, T, hi, end, CAUSAL, ONE_QUERY, by_row, N)
        m = gl.full((N,), LOWEST, gl.float32, by_row)
        total = gl.full((N,), 0.0, gl.float32, by_row)

        mbarrier.wait(bar.queries, item & 1)
        parts = _queries_of_groups(x, GROUPS, BLOCK_P)
        row_scale = _row_scale(x) * scale_log2
        stage = g % STAGES
        mbarrier.wait(bar.full.index(stage), (g // STAGES) & 1)
        even = _begin(x, parts, stage, 0, even, never, GROUPS)
        odd = _begin(x, parts, stage, 1, odd, never, GROUPS)
        for _ in range(n - 1):
            if (t < lo) | (t + BLOCK > hi):
                _clear_dead_factors(x, stage, t, lo, hi)
            s, even, odd, largest = _add_groups(x, parts, even, odd, stage, never, GROUPS, PRODUCTS)
            ahead = (g + 1) % STAGES
            mbarrier.wait(bar.full.index(ahead), ((g + 1) // STAGES) & 1)
            even = _begin(x, parts, ahead, 0, even, never, GROUPS)
            odd = _begin(x, parts, ahead, 1, odd, never, GROUPS)
            m, total = _publish_groups(
                x, bar, s, largest, m, total, row_scale, g, stage, t, lo, hi, sure, limit, GROUPS, CAUSAL
            )
            stage = ahead
            t += BLOCK
            g += 1
        if (row + 1 >= B) | (todo - taken <= overhead):
            _launch_later()
        if (t < lo) | (t + BLOCK > hi):
            _clear_dead_factors(x, stage, t, lo, hi)
        s, even, odd, largest = _add_groups(x, parts, even, odd, stage, never, GROUPS, PRODUCTS)
        m, total = _publish_groups(
            x, bar, s, largest, m, total, row_scale, g, stage, t, lo, hi, sure, limit, GROUPS, CAUSAL
        )
        _report(
            x, bar, m, total, p_lse, p_part_lse, p_parts, part, row, skip, rest, share, i_tile, n_tiles, H, S, by_row,
            N, ONE_QUERY,
        )  # fmt: skip
        g += 1
        item += 1
        todo -= taken
        row += 1
        position = 0
