"""A block's share of the output of ``hopper_turned.py`` with more than 32 rows: products in FP8.

P is e4m3 and values are what they are in the cache, taken apart into even and odd columns and not converted. A sum of
FP8 products drops what is small beside it, so each block is a sum of its own, of half the rows at a time, for which
there are registers; two of them are under way while one before is added to the output.

The first words of the next block are loaded while the last products of this one run. What the next block's exponents
count from is looked at then, too: for most blocks it is what they counted from before, and nothing of the output has
to be multiplied.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_turned_room import _of_part
from mlacompile.kernels.mla_decode.hopper_turned_words import (
    FP8_STEP,
    _clear_dead_words,
    _fp8_columns_of,
    _fp8_words_of,
    _fragment,
    _halves,
    _joined,
    _shrunk,
)


@gluon.jit
def _moved(alpha):
    """Whether any row counts from another maximum than before. Every warp looks at all rows: none waits for another."""
    layout: gl.constexpr = gl.BlockedLayout([alpha.shape[0] // 32], [32], [gl.num_warps()], [0])
    return gl.max(alpha.load(layout).to(gl.int32, bitcast=True) ^ 0x3F800000, 0) != 0


@gluon.jit
def _words_of_tile(words, g, TILE: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    """A block's tile: of the first tokens, of the last."""
    tile = words.index(g % STAGES * TILES + TILE)
    return _fp8_words_of(tile, 0, layout), _fp8_words_of(tile, 1, layout)


@gluon.jit
def _first_words(words, g, t, lo, hi, TILES: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    """What the first products of a block multiply, which has arrived."""
    if (t < lo) | (t + BLOCK > hi):
        for i in gl.static_range(TILES):
            _clear_dead_words(words.index(g % STAGES * TILES + i), t, lo, hi)
    return _words_of_tile(words, g, 0, TILES, STAGES, layout)


@gluon.jit
def _begun(x, columns, last, buffer, FIRST: gl.constexpr):
    """Begins the products of a tile's even or odd columns and half the rows of P: of the first tokens, of the last."""
    rows: gl.constexpr = x.p.shape[1] // 2
    s = gl.zeros((columns.shape[0], rows), gl.float32, _fragment(rows, gl.num_warps(), FP8_STEP))
    right = x.p.index(buffer).slice(FIRST, rows, dim=0).permute((1, 0))
    s = warpgroup_mma(columns, right, s, use_acc=False, is_async=True)
    right = x.p_last.index(buffer).slice(FIRST, rows, dim=0).permute((1, 0))
    return warpgroup_mma(last, right, s, is_async=True)


@gluon.jit
def _plus(to, s):
    """Adds a finished sum to the output at once: a plain addition would be put off, and the sum kept in registers."""
    s = gl.convert_layout(s, to.type.layout, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "add.f32 $0, $1, $2;", "=f,f,f", [to, s], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _added(x, first, last, buffer, to_even, to_odd):
    """Adds a tile's products to the output, but for the last half of the rows of odd columns, which are under way."""
    rows: gl.constexpr = x.p.shape[1] // 2
    layout: gl.constexpr = _fragment(rows, gl.num_warps(), FP8_STEP)
    even_low, even_high = _halves(to_even)
    odd_low, odd_high = _halves(to_odd)
    even, odd = _fp8_columns_of(first, layout)
    even_last, odd_last = _fp8_columns_of(last, layout)
    s = _begun(x, even, even_last, buffer, 0)
    even_low = _plus(even_low, warpgroup_mma_wait(0, deps=(s,)))
    s = _begun(x, even, even_last, buffer, rows)
    even_high = _plus(even_high, warpgroup_mma_wait(0, deps=(s,)))
    s = _begun(x, odd, odd_last, buffer, 0)
    odd_low = _plus(odd_low, warpgroup_mma_wait(0, deps=(s,)))
    s = _begun(x, odd, odd_last, buffer, rows)
    return _joined(even_low, even_high), odd_low, odd_high, s


@gluon.jit
def _add_wide_block(x, bar, words, g, t, lo, hi, moved, more, first, last, even0, odd0, even1, odd1,
                    TILES: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Adds a block's products, and says that its stage and its P are no longer needed.

    first, last: its first words. moved: earlier output has to be multiplied. Returns these for the next block, too, if
    there is one ``more`` of this item.
    """
    stage = g % STAGES
    buffer = g & 1
    if moved:
        alpha = x.alpha.index(buffer).load(gl.SliceLayout(0, layout))
        even0, odd0, even1, odd1 = _shrunk(even0, odd0, even1, odd1, alpha, TILES)
    mbarrier.wait(bar.p_full.index(buffer), (g >> 1) & 1)
    mbarrier.arrive(bar.empty.index(stage), count=1)  # its words are in registers, its scores are computed
    even0, low, high, s = _added(x, first, last, buffer, even0, odd0)
    if TILES > 1:
        tile = words.index(stage * TILES + 1)
        first = _fp8_words_of(tile, 0, layout)
        odd0 = _joined(low, _plus(high, warpgroup_mma_wait(0, deps=(s,))))
        last = _fp8_words_of(tile, 1, layout)
        mbarrier.arrive(bar.empty_last.index(stage), count=1)
        even1, low, high, s = _added(x, first, last, buffer, even1, odd1)
    if more:
        mbarrier.wait(bar.m.index(buffer ^ 1), ((g + 1) >> 1) & 1)
        moved = _moved(x.alpha.index(buffer ^ 1))  # known from the block's scores: it has arrived
        first, last = _first_words(words, g + 1, t + BLOCK, lo, hi, TILES, STAGES, layout)
    odd_n = _joined(low, _plus(high, warpgroup_mma_wait(0, deps=(s,))))
    if TILES > 1:
        odd1 = odd_n
    else:
        odd0 = odd_n
    mbarrier.arrive(bar.p_empty.index(buffer), count=1)
    return even0, odd0, even1, odd1, moved, first, last
