"""A block's share of the output of ``hopper_turned.py`` with more than 32 rows.

Products take longer than what is loaded for them, so words are loaded two steps ahead, and the first words of the next
block while the last products of this one run. What the next block's exponents count from is looked at then, too: for
most blocks it is what they counted from before, and nothing of the output has to be multiplied.
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
def _moved(x, buffer):
    """Whether any row counts from another maximum than before. Every warp looks at all rows: none waits for another."""
    layout: gl.constexpr = gl.BlockedLayout([x.m.shape[1] // 32], [32], [gl.num_warps()], [0])
    now = x.m.index(buffer).load(layout).to(gl.int32, bitcast=True)
    before = x.m.index(buffer ^ 1).load(layout).to(gl.int32, bitcast=True)
    return gl.max((now != before).to(gl.int32), 0) != 0


@gluon.jit
def _first_words(words, g, t, lo, hi, TILES: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    """What the first two steps of a block multiply, whose scores are computed."""
    first = g % STAGES * TILES
    if (t < lo) | (t + BLOCK > hi):
        for i in gl.static_range(TILES):
            _clear_dead_words(words.index(first + i), t, lo, hi)
    return _fp8_words_of(words.index(first), 0, layout), _fp8_words_of(words.index(first), 1, layout)


@gluon.jit
def _add_fp8_products(even, odd, half, to_even, to_odd):
    """Adds the products of FP8_STEP tokens of values and P."""
    right = half.permute((1, 0))
    to_even = warpgroup_mma(even, right, to_even, is_async=True)
    return to_even, warpgroup_mma(odd, right, to_odd, is_async=True)


@gluon.jit
def _add_wide_block(x, bar, words, g, t, lo, hi, more, later, latest, even0, odd0, even1, odd1,
                    TILES: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Adds a block's products, and says that its stage and its P are no longer needed.

    later, latest: its first words, in the order of their steps. Returns these for the next block, too, if there is one
    ``more`` of this item, and the output in units of that.
    """
    STEPS: gl.constexpr = BLOCK // FP8_STEP
    N: gl.constexpr = TILES * STEPS
    stage = g % STAGES
    buffer = g & 1
    v_even, v_odd = _fp8_columns_of(later, layout)
    later = latest
    mbarrier.wait(bar.p_full.index(buffer), (g >> 1) & 1)
    for i in gl.static_range(N):
        half = x.p if i % STEPS == 0 else x.p_last
        if i < STEPS:
            even0, odd0 = _add_fp8_products(v_even, v_odd, half.index(buffer), even0, odd0)
        else:
            even1, odd1 = _add_fp8_products(v_even, v_odd, half.index(buffer), even1, odd1)
        if i > 0 and i + 1 < N:
            even0, odd0, even1, odd1 = warpgroup_mma_wait(2, deps=(even0, odd0, even1, odd1))
        if i + 1 < N:
            v_even, v_odd = _fp8_columns_of(later, layout)
        if i + 2 < N:
            later = _fp8_words_of(words.index(stage * TILES + (i + 2) // STEPS), (i + 2) % STEPS, layout)
        if i + 2 == max(N - 1, 2):  # the last words are in registers, and P holds the factors
            mbarrier.arrive(bar.empty.index(stage), count=1)
    moved = more
    if more:
        mbarrier.wait(bar.m.index(buffer ^ 1), ((g + 1) >> 1) & 1)
        moved = _moved(x, buffer ^ 1)  # known from the block's scores: its latents have arrived
        later, latest = _first_words(words, g + 1, t + BLOCK, lo, hi, TILES, STAGES, layout)
    even0, odd0, even1, odd1 = warpgroup_mma_wait(0, deps=(even0, odd0, even1, odd1))
    if moved:
        by_row: gl.constexpr = gl.SliceLayout(0, layout)
        alpha = gl.exp2(x.m.index(buffer).load(by_row) - x.m.index(buffer ^ 1).load(by_row))
        even0, odd0, even1, odd1 = _shrunk(even0, odd0, even1, odd1, alpha, TILES)
    mbarrier.arrive(bar.p_empty.index(buffer), count=1)
    return even0, odd0, even1, odd1, later, latest
