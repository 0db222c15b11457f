"""A block's share of the output of ``hopper_turned.py`` with more than 32 rows.

Of long rows P is e4m3, and values are what they are in the cache, taken apart into even and odd columns and not
converted (``COARSE``). That rounds each weight by up to 6 %, of which the output keeps the less the more tokens share
in it. Of short rows P is float16, and so are values on their way through registers.

All words of a block are loaded as soon as its scores are computed: then its stage is sent for again while its P is
still reckoned. What its exponents count from is known by then, too: for most blocks it is what they counted from
before, and nothing of the output has to be multiplied. With several factors a token, whose scores take longer, words
are loaded while those are still reckoned. With one, products of scores would wait for shared memory then, and all of it
is 6 % slower (docs/kernels.md). What nobody sees is zeroed under the products of its scores, which are not used.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from mlacompile.kernels.hopper import all_warps
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_rows import _moved
from mlacompile.kernels.mla_decode.hopper_turned_moved import _shrunk
from mlacompile.kernels.mla_decode.hopper_turned_room import PLACES, _coarse, _coarse_half, _fragment, _parts_apart
from mlacompile.kernels.mla_decode.hopper_turned_shares import _columns_times_shares
from mlacompile.kernels.mla_decode.hopper_turned_words import (
    FP8_STEP,
    IN_ORDER,
    IN_PAIRS,
    STEP,
    _add_products,
    _both_of_words,
    _clear_dead_words,
    _columns_of_both,
    _fp8_columns_of,
    _fp8_words_of,
    _kept,
    _pairs_of,
    _step_of,
)


@gluon.jit
def _words(words, first, i: gl.constexpr, COARSE: gl.constexpr, layout: gl.constexpr):
    """Words of step i of a block whose first tile that is."""
    STEPS: gl.constexpr = BLOCK // (FP8_STEP if COARSE else STEP)
    tile = words.index(first + i // STEPS)
    if COARSE:
        return _fp8_words_of(tile, i % STEPS, layout)
    else:
        return _kept(_pairs_of(tile, i % STEPS, gl.DotOperandLayout(0, layout, 2)))


@gluon.jit
def _clear_dead_block(words, first, t, lo, hi, TILES: gl.constexpr):
    """Zero what nobody sees of a block whose first tile that is."""
    if (t < lo) | (t + BLOCK > hi):
        for i in gl.static_range(TILES):
            _clear_dead_words(words.index(first + i), t, lo, hi)
        all_warps()  # here, or the compiler has warps wait for each other in every block


@gluon.jit
def _columns(x, words, g, i: gl.constexpr, COARSE: gl.constexpr, GROUPS: gl.constexpr, layout: gl.constexpr):
    """Even and odd columns of step i of block g, as left operands: as they are if COARSE, or in float16."""
    if COARSE:
        return _fp8_columns_of(words, IN_PAIRS if _parts_apart(x.q.shape) else IN_ORDER, layout)
    else:
        STEPS: gl.constexpr = BLOCK // STEP
        both = _both_of_words(words, gl.DotOperandLayout(0, layout, 2))
        if GROUPS > 1:
            return _columns_times_shares(x, both, g % PLACES, i // STEPS, i % STEPS)
        else:
            return _columns_of_both(both)


@gluon.jit
def _weights(x, buffer, i: gl.constexpr, STEPS: gl.constexpr, COARSE: gl.constexpr):
    """P of step i of STEPS, as a right operand."""
    half = x.p if i < STEPS // 2 else x.p_last
    if _parts_apart(x.q.shape):
        if COARSE:
            return _coarse(x.p, buffer, gl.float8e4nv).slice(i * FP8_STEP, FP8_STEP, dim=1).permute((1, 0))
        else:
            return _step_of(x.p.index(buffer), i)
    elif COARSE:
        return _coarse_half(half, buffer).permute((1, 0))
    else:
        return _step_of(half.index(buffer), i % (STEPS // 2))


@gluon.jit
def _words_of_block(words, first, t, lo, hi, TILES: gl.constexpr, COARSE: gl.constexpr, layout: gl.constexpr):
    """All words of a block whose first tile that is, zeros in place of what nobody sees."""
    STEPS: gl.constexpr = BLOCK // (FP8_STEP if COARSE else STEP)
    _clear_dead_block(words, first, t, lo, hi, TILES)
    parts = ()
    for i in gl.static_range(TILES * STEPS):
        parts = parts + (_words(words, first, i, COARSE, layout),)  # type: ignore[assignment]
    return parts


@gluon.jit
def _counted_anew(x, buffer, earlier, even0, odd0, even1, odd1, TILES: gl.constexpr):
    """Output of earlier blocks, if there are any, in units of what exponents of this one count from."""
    alpha = x.alpha.index(buffer)
    moved = _moved(alpha)
    if (moved != 0) & earlier:
        even0, odd0, even1, odd1 = _shrunk(even0, odd0, even1, odd1, alpha, moved, TILES)
    return even0, odd0, even1, odd1


@gluon.jit
def _add_wide_block(x, bar, words, g, t, lo, hi, earlier, even0, odd0, even1, odd1, TILES: gl.constexpr,
                    STAGES: gl.constexpr, COARSE: gl.constexpr, GROUPS: gl.constexpr,
                    layout: gl.constexpr):  # fmt: skip
    """Adds a block's products, in FP8 if COARSE, and says that its stage and its P are no longer needed.

    earlier: there is output of earlier blocks.
    """
    STEPS: gl.constexpr = BLOCK // (FP8_STEP if COARSE else STEP)
    stage = g % STAGES
    buffer = g & 1
    if GROUPS > 1:
        mbarrier.wait(bar.full.index(stage), (g // STAGES) & 1)
        parts = _words_of_block(words, stage * TILES, t, lo, hi, TILES, COARSE, layout)
        mbarrier.wait(bar.m.index(buffer), (g >> 1) & 1)  # the block's scores are computed: keys are not needed either
        mbarrier.arrive(bar.empty.index(stage), count=1)
        even0, odd0, even1, odd1 = _counted_anew(x, buffer, earlier, even0, odd0, even1, odd1, TILES)
    else:
        mbarrier.wait(bar.m.index(buffer), (g >> 1) & 1)  # the block's scores are computed: it has arrived
        even0, odd0, even1, odd1 = _counted_anew(x, buffer, earlier, even0, odd0, even1, odd1, TILES)
        parts = _words_of_block(words, stage * TILES, t, lo, hi, TILES, COARSE, layout)
        mbarrier.arrive(bar.empty.index(stage), count=1)
    mbarrier.wait(bar.p_full.index(buffer), (g >> 1) & 1)
    for i in gl.static_range(TILES * STEPS):
        even, odd = _columns(x, parts[i], g, i, COARSE, GROUPS, layout)
        right = _weights(x, buffer, i % STEPS, STEPS, COARSE)
        if i < STEPS:
            even0, odd0 = _add_products(even, odd, right, even0, odd0)
        else:
            even1, odd1 = _add_products(even, odd, right, even1, odd1)
        if i > 0 and i + 1 < TILES * STEPS:  # so that registers of words serve for those of later ones
            even0, odd0, even1, odd1 = warpgroup_mma_wait(2, deps=(even0, odd0, even1, odd1))
    even0, odd0, even1, odd1 = warpgroup_mma_wait(0, deps=(even0, odd0, even1, odd1))
    mbarrier.arrive(bar.p_empty.index(buffer), count=1)
    return even0, odd0, even1, odd1


@gluon.jit
def _sum_of_item(x, bar, words, g, t, n, lo, hi, TILES: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
                 COARSE: gl.constexpr, to_layout: gl.constexpr):  # fmt: skip
    """The sum of the products of an item's n blocks, the first of which is block g, from token t on."""
    PAIRS: gl.constexpr = words.shape[2]
    ROWS: gl.constexpr = to_layout.instr_shape[1]
    layout: gl.constexpr = _fragment(ROWS, gl.num_warps(), 32 if COARSE else 16)
    even0 = gl.zeros((PAIRS, ROWS), gl.float32, layout)
    odd0 = gl.zeros((PAIRS, ROWS), gl.float32, layout)
    even1 = gl.zeros((PAIRS, ROWS), gl.float32, layout)
    odd1 = gl.zeros((PAIRS, ROWS), gl.float32, layout)
    t += (n - 1) * BLOCK
    for i in range(n):
        even0, odd0, even1, odd1 = _add_wide_block(
            x, bar, words, g, t, lo, hi, i > 0, even0, odd0, even1, odd1, TILES, STAGES, COARSE, GROUPS, layout
        )
        t -= BLOCK
        g += 1
    even0 = gl.convert_layout(even0, to_layout, assert_trivial=True)
    odd0 = gl.convert_layout(odd0, to_layout, assert_trivial=True)
    even1 = gl.convert_layout(even1, to_layout, assert_trivial=True)
    return even0, odd0, even1, gl.convert_layout(odd1, to_layout, assert_trivial=True)
