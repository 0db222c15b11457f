"""A block's share of the output of ``hopper_turned.py`` with more than 32 rows: products in FP8.

P is e4m3, and values are what they are in the cache, taken apart into even and odd columns and not converted. One part
of P rounds each weight by up to 6 %, of which the output keeps the less the more tokens share in it; with few tokens P
has two parts, and both are multiplied.

The first words of the next block are loaded while the last products of this one run. What the next block's exponents
count from is looked at then, too: for most blocks it is what they counted from before, and nothing of the output has
to be multiplied.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_turned_words import (
    FP8_STEP,
    _clear_dead_words,
    _fp8_columns_of,
    _fp8_words_of,
    _shrunk,
)


@gluon.jit
def _moved(alpha):
    """Whether any row counts from another maximum than before. Every warp looks at all rows: none waits for another."""
    layout: gl.constexpr = gl.BlockedLayout([alpha.shape[0] // 32], [32], [gl.num_warps()], [0])
    return gl.max(alpha.load(layout).to(gl.int32, bitcast=True) ^ 0x3F800000, 0) != 0


@gluon.jit
def _first_words(words, g, t, lo, hi, TILES: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    """What the first two steps of a block multiply, whose scores are computed."""
    first = g % STAGES * TILES
    if (t < lo) | (t + BLOCK > hi):
        for i in gl.static_range(TILES):
            _clear_dead_words(words.index(first + i), t, lo, hi)
    return _fp8_words_of(words.index(first), 0, layout), _fp8_words_of(words.index(first), 1, layout)


@gluon.jit
def _add_fp8_products(even, odd, p, p_left, to_even, to_odd, TWO_PARTS: gl.constexpr):
    """Adds the products of FP8_STEP tokens of values and P, whose second part is ``p_left``."""
    if TWO_PARTS:
        to_even = warpgroup_mma(even, p_left.permute((1, 0)), to_even, is_async=True)
        to_odd = warpgroup_mma(odd, p_left.permute((1, 0)), to_odd, is_async=True)
    to_even = warpgroup_mma(even, p.permute((1, 0)), to_even, is_async=True)
    return to_even, warpgroup_mma(odd, p.permute((1, 0)), to_odd, is_async=True)


@gluon.jit
def _add_wide_block(x, bar, words, g, t, lo, hi, moved, more, w0, w1, even0, odd0, even1, odd1, TILES: gl.constexpr,
                    STAGES: gl.constexpr, layout: gl.constexpr, TWO_PARTS: gl.constexpr):  # fmt: skip
    """Adds a block's products, and says that its stage and its P are no longer needed.

    w0, w1: its first words, in the order of their steps. moved: earlier output has to be multiplied. Returns these for
    the next block, too, if there is one ``more`` of this item.
    """
    AT_ONCE: gl.constexpr = 4 if TWO_PARTS else 2  # products of a step
    stage = g % STAGES
    buffer = g & 1
    p, p_left = x.p.index(buffer), x.p_left.index(buffer)
    p_last, p_left_last = x.p_last.index(buffer), x.p_left_last.index(buffer)
    if moved:
        alpha = x.alpha.index(buffer).load(gl.SliceLayout(0, layout))
        even0, odd0, even1, odd1 = _shrunk(even0, odd0, even1, odd1, alpha, TILES)
    mbarrier.wait(bar.p_full.index(buffer), (g >> 1) & 1)
    even, odd = _fp8_columns_of(w0, layout)
    even0, odd0 = _add_fp8_products(even, odd, p, p_left, even0, odd0, TWO_PARTS)
    # Words are loaded when those before them have been taken apart: registers are short.
    even, odd = _fp8_columns_of(w1, layout)
    if TILES > 1:
        tile = words.index(stage * TILES + 1)
        w2 = _fp8_words_of(tile, 0, layout)
        even0, odd0 = _add_fp8_products(even, odd, p_last, p_left_last, even0, odd0, TWO_PARTS)
        even0, odd0, even1, odd1 = warpgroup_mma_wait(AT_ONCE, deps=(even0, odd0, even1, odd1))
        even, odd = _fp8_columns_of(w2, layout)
        w3 = _fp8_words_of(tile, 1, layout)
        mbarrier.arrive(bar.empty.index(stage), count=1)  # all words are in registers, and P holds the factors
        even1, odd1 = _add_fp8_products(even, odd, p, p_left, even1, odd1, TWO_PARTS)
        even0, odd0, even1, odd1 = warpgroup_mma_wait(AT_ONCE, deps=(even0, odd0, even1, odd1))
        even, odd = _fp8_columns_of(w3, layout)
        even1, odd1 = _add_fp8_products(even, odd, p_last, p_left_last, even1, odd1, TWO_PARTS)
    else:
        mbarrier.arrive(bar.empty.index(stage), count=1)
        even0, odd0 = _add_fp8_products(even, odd, p_last, p_left_last, even0, odd0, TWO_PARTS)
    if more:
        mbarrier.wait(bar.m.index(buffer ^ 1), ((g + 1) >> 1) & 1)
        moved = _moved(x.alpha.index(buffer ^ 1))  # known from the block's scores: it has arrived
        w0, w1 = _first_words(words, g + 1, t + BLOCK, lo, hi, TILES, STAGES, layout)
    even0, odd0, even1, odd1 = warpgroup_mma_wait(0, deps=(even0, odd0, even1, odd1))
    mbarrier.arrive(bar.p_empty.index(buffer), count=1)
    return even0, odd0, even1, odd1, moved, w0, w1


@gluon.jit
def _sum_of_item(x, bar, words, g, t, n, lo, hi, even0, odd0, even1, odd1, TILES: gl.constexpr, STAGES: gl.constexpr,
                 layout: gl.constexpr, TWO_PARTS: gl.constexpr):  # fmt: skip
    """Adds the products of an item's n blocks, the first of which is block g, from token t on."""
    mbarrier.wait(bar.m.index(g & 1), (g >> 1) & 1)
    moved = n < 0  # there is no earlier output
    w0, w1 = _first_words(words, g, t, lo, hi, TILES, STAGES, layout)
    for i in range(n):
        even0, odd0, even1, odd1, moved, w0, w1 = _add_wide_block(
            x, bar, words, g, t, lo, hi, moved, i + 1 < n, w0, w1, even0, odd0, even1, odd1, TILES, STAGES, layout,
            TWO_PARTS,
        )  # fmt: skip
        t += BLOCK
        g += 1
    return even0, odd0, even1, odd1
