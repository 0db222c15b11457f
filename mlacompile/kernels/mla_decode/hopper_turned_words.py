"""Words of two FP8 columns: how ``hopper_turned.py`` makes left operands of a cache as it lies in shared memory."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_turned_room import _fragment

STEP = gl.constexpr(16)  # tokens whose values are multiplied at once: registers are short
FP8_STEP = gl.constexpr(32)  # the same of a product in FP8

# Four e4m3 values, (even, odd) of one token and (even, odd) of the next, to float16: even of both, odd of both.
SPLIT = gl.constexpr(
    "{ .reg .b32 x; .reg .b16 a, b; prmt.b32 x, $2, 0, 0x3120; mov.b32 {a, b}, x; "
    "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)
# The same and two tokens eight further on, as they are: even of all four, odd of all four, in that order, or each token
# beside the one eight further on.
IN_ORDER = gl.constexpr("prmt.b32 $0, $2, $4, 0x6420; prmt.b32 $1, $2, $4, 0x7531;")
IN_PAIRS = gl.constexpr("prmt.b32 $0, $2, $4, 0x6240; prmt.b32 $1, $2, $4, 0x7351;")


@gluon.jit
def _step_of(p, i):
    """P of STEP tokens, as a right operand."""
    return p.slice(i * STEP, STEP, dim=1).permute((1, 0))


@gluon.jit
def _add_products(even, odd, right, to_even, to_odd):
    """Adds the products of values of some tokens and their P."""
    to_even = warpgroup_mma(even, right, to_even, is_async=True)
    return to_even, warpgroup_mma(odd, right, to_odd, is_async=True)


@gluon.jit
def _pairs_of(tile, i, layout: gl.constexpr):
    """Pairs of columns by STEP tokens, as left operands."""
    return tile.slice(i * STEP, STEP, dim=0).permute((1, 0)).load(layout)


@gluon.jit
def _columns_of(pairs):
    """Even columns and odd columns in float16."""
    return gl.inline_asm_elementwise(SPLIT, "=r,=r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2)


@gluon.jit
def _kept(pairs):
    """Pairs as words, which a loop can keep in as many registers: as 16-bit numbers it would take them apart."""
    words = gl.inline_asm_elementwise(
        "mov.b32 $0, $2; mov.b32 $1, $2;", "=r,=r,r", [pairs], dtype=gl.int32, is_pure=True, pack=2
    )
    words, _same = gl.split(words.reshape([pairs.shape[0], pairs.shape[1] // 2, 2]))
    return words


@gluon.jit
def _both_of_words(words, layout: gl.constexpr):
    """Each of the words that were kept, in place of the two tokens whose pairs it holds."""
    both = gl.join(words, words).reshape([words.shape[0], 2 * words.shape[1]])
    return gl.convert_layout(both, layout, assert_trivial=True)


@gluon.jit
def _columns_of_both(both):
    """``_columns_of`` pairs that were kept."""
    return gl.inline_asm_elementwise(SPLIT, "=r,=r,r,r", [both], dtype=(gl.float16, gl.float16), is_pure=True, pack=2)


@gluon.jit
def _in_order_of_words(x):
    """Columns in the order in which a thread has those of a fragment."""
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = x.shape[1]
    return x.reshape([rows, columns // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([rows, columns])


@gluon.jit
def _fp8_words_of(tile, i, layout: gl.constexpr):
    """Words of pairs of columns, of the tokens of FP8_STEP: [pairs, FP8_STEP / 2].

    A thread has tokens 2t, 2t + 1, 2t + 8 and 2t + 9 of 16, and calls them 4t to 4t + 3, as it does those of P, in that
    order or IN_PAIRS.
    """
    as_16_bits: gl.constexpr = gl.DotOperandLayout(0, _fragment(layout.instr_shape[1], gl.num_warps()), 2)
    pairs = tile.slice(i * FP8_STEP, FP8_STEP, dim=0).permute((1, 0)).load(as_16_bits)
    return _kept(_in_order_of_words(pairs))


@gluon.jit
def _fp8_columns_of(words, ORDER: gl.constexpr, layout: gl.constexpr):
    """Even columns and odd columns in FP8, as left operands, tokens in the order of P."""
    both = gl.join(words, words).reshape([words.shape[0], FP8_STEP])
    both = gl.convert_layout(both, gl.DotOperandLayout(0, layout, 4), assert_trivial=True)
    return gl.inline_asm_elementwise(
        ORDER, "=r,=r,r,r,r,r", [both], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4
    )


@gluon.jit
def _clear_dead_words(words, t, lo, hi):
    """Zero the rows of a tile of words whose tokens nobody sees: 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    live = (o_t >= lo) & (o_t < hi)
    for i in gl.static_range(words.shape[1] // 64):
        panel = words.slice(i * 64, 64, dim=1)
        panel.store(gl.where(live[:, None], panel.load(layout), 0))
    fence_async_shared()
