"""Several factors a token, one for each group of 128 columns, where a tile of ``hopper_turned.py`` has 64 rows.

P is multiplied with the largest factor of each token, and values with what each group has of that, its share, while
they are converted to float16: P is one, and ``_values`` have one product for all columns, as with one factor a token.
Scores of a group are multiplied with its share, too, before they are added to those of other groups.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_turned_room import FACTORS
from mlacompile.kernels.mla_decode.hopper_turned_scores import LEAST_FACTOR
from mlacompile.kernels.mla_decode.hopper_turned_words import STEP

SMALLER = gl.constexpr(2.0**-3)  # of factors, or the reciprocal of a very large one would not be a normal number
LARGEST_SHARE = gl.constexpr(128.0)  # of the group with the largest factor: float16 holds 448 times that
# ``SPLIT``, and both times what their group has of the factors of the two tokens.
SPLIT_TIMES = gl.constexpr(
    "{ .reg .b32 x; .reg .b16 a, b; prmt.b32 x, $2, 0, 0x3120; mov.b32 {a, b}, x; "
    "cvt.rn.f16x2.e4m3x2 x, a; mul.rn.f16x2 $0, x, $4; cvt.rn.f16x2.e4m3x2 x, b; mul.rn.f16x2 $1, x, $4; }"
)


@gluon.jit
def _columns_of_four(x):
    """Four columns, from [tokens, 4]."""
    even, odd = gl.split(x.reshape([x.shape[0], 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def _reciprocal(x):
    """1 / x, at most a unit in the last place off, of what is between 2^-126 and 2^126."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _prepare_factors(x, place, t, lo, hi, GROUPS: gl.constexpr):
    """From a block's factors, [tokens, 4], what its scores, its P and its values are multiplied with.

    Factors of tokens that nobody sees may be anything, and are taken for 1. None is nearer to 0 than LEAST_FACTOR.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, FACTORS], [32, 1], [gl.num_warps(), 1], [1, 0])
    o_t = t + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    f = gl.where(((o_t >= lo) & (o_t < hi))[:, None], x.factors.index(place).load(layout), 1.0)
    f = gl.where(gl.abs(f) < LEAST_FACTOR, LEAST_FACTOR, f)
    first, second, third, fourth = _columns_of_four(f)
    largest = gl.maximum(gl.abs(first), gl.abs(second))
    if GROUPS > 2:
        largest = gl.maximum(largest, gl.abs(third))
    if GROUPS > 3:
        largest = gl.maximum(largest, gl.abs(fourth))
    largest = largest * (1 / LARGEST_SHARE)
    unit = _reciprocal(largest * SMALLER)
    shares = f * SMALLER * gl.convert_layout(unit, gl.SliceLayout(1, layout))[:, None]
    x.shares.index(place).permute((1, 0)).store(shares.to(gl.float16))
    x.largest.index(place).store(largest)


@gluon.jit
def _columns_times_shares(x, both, place, tile: gl.constexpr, step: gl.constexpr):
    """Even and odd columns of 256 in float16, times what their groups have of a token's factor.

    both: words of pairs, in place of the two tokens that they are of. tile: of 128 pairs, the two halves of which are
    groups. step: of STEP tokens.
    """
    layout: gl.constexpr = both.type.layout
    words = both.reshape([2, both.shape[0] // 2, STEP])
    shares = x.shares.index(place).slice(2 * tile, 2, dim=0).slice(step * STEP, STEP, dim=1)
    r = gl.expand_dims(shares.load(gl.SliceLayout(1, words.type.layout)), 1)
    r, _same = gl.broadcast(r, words)
    r = gl.convert_layout(r.reshape([both.shape[0], STEP]), layout, assert_trivial=True)
    return gl.inline_asm_elementwise(
        SPLIT_TIMES, "=r,=r,r,r,r", [both, r], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
    )
