"""What rows of ``hopper_turned_by_tokens.py`` count from, and their sums: tokens are spread over threads and warps.

A thread has scores of two tokens and 16 rows. What it finds of them is folded: of two words it keeps one, gives the
other away for what another thread has of its, and after three rounds has two rows of all tokens of its warp. Sums are
folded so while the products of the next block run. The largest score of a row is asked for only where one exceeds what
the row counts from, which all warps find out in one barrier; that code is cold, and so is kept short.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mlacompile.kernels.hopper import _any_thread
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_turned_by_turns import SLACK, SPARE
from mlacompile.kernels.mla_decode.hopper_turned_moved import _halves, _joined
from mlacompile.kernels.mla_decode.hopper_turned_room import _fragment

QUARTER = gl.constexpr(16)  # rows whose numbers a thread loads at once
FRESH = gl.constexpr(2.0)  # alpha of rows that have not seen a token


@gluon.constexpr_function
def _fold(bit, combine):
    """Two words of two rows, one of which a thread keeps and gives the other away for what another has of its."""
    return (
        "{ .reg .pred high; .reg .b32 kept, given; setp.ne.b32 high, $3, 0; selp.b32 kept, $2, $1, high; "
        f"selp.b32 given, $1, $2, high; shfl.sync.bfly.b32 given, given, {4 * bit}, 31, 0xffffffff; "
        f"{combine} $0, kept, given; }}"
    )


TWO_TO_FLOAT16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
TWO_FROM_FLOAT16 = gl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")
TWO_TO_BFLOAT16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
TWO_FROM_BFLOAT16 = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@gluon.constexpr_function
def _by_tokens():
    """The layout of scores: tokens by rows (query, head)."""
    return _fragment(ROWS, 4)


@gluon.constexpr_function
def _by_words():
    """The same of words of two rows each."""
    words, lanes = [[0, 4], [0, 8], [0, 16]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(words, lanes, [[8, 0], [16, 0]], [], [BLOCK // 2, ROWS // 2])


@gluon.constexpr_function
def _one():
    """One number, for every thread."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.constexpr_function
def _two_rows():
    """Two rows for each thread of a warp, and the same for every warp."""
    return gl.BlockedLayout([2], [32], [4], [0])


@gluon.constexpr_function
def _sums_of_warps():
    """The same of what each warp has of its own."""
    return gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])


@gluon.jit
def _pairs_of_tokens(x):
    """The i-th and the (i + 8)-th of 16 tokens, side by side."""
    return x.reshape([BLOCK // 16, 2, 8, ROWS])


@gluon.jit
def _words_of_thread(even_and_odd, CODE: gl.constexpr):
    """Words of two rows, from what a thread has of each."""
    even, odd = gl.split(even_and_odd.reshape([BLOCK // 2, ROWS // 2, 2]))
    words = gl.inline_asm_elementwise(CODE, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)
    return gl.convert_layout(words, _by_words(), assert_trivial=True)


@gluon.jit
def _folded(words, COMBINE: gl.constexpr, BIT: gl.constexpr):
    """What threads have whose tokens differ in that bit, put together: of half of the rows each."""
    CODE: gl.constexpr = _fold(BIT, COMBINE)
    N: gl.constexpr = words.shape[1] // 2
    first, second = gl.split(words.reshape([BLOCK // 2, 2, N]).permute((0, 2, 1)))
    high = (gl.arange(0, BLOCK // 2, gl.SliceLayout(1, first.type.layout)) & BIT)[:, None]
    high, first = gl.broadcast(high, first)
    return gl.inline_asm_elementwise(CODE, "=r,r,r,r", [first, second, high], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _folded_to_two_rows(words, COMBINE: gl.constexpr):
    """What a warp's threads have, put together: a word of two rows each."""
    return _folded(_folded(_folded(words, COMBINE, 4), COMBINE, 2), COMBINE, 1)


@gluon.jit
def _sums_of_thread(e):
    """Sums of each thread's tokens: words of two rows in float16, whose exponentials are 2^SLACK at most."""
    return _words_of_thread(gl.sum(_pairs_of_tokens(e), 1), TWO_TO_FLOAT16)


@gluon.jit
def _sums_of_warp(words):
    """Sums of each warp's tokens."""
    words = _folded_to_two_rows(words, "add.rn.f16x2")
    even, odd = gl.inline_asm_elementwise(
        TWO_FROM_FLOAT16, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )
    return gl.convert_layout(gl.join(even, odd).reshape([4, ROWS]), _sums_of_warps(), assert_trivial=True)


@gluon.jit
def _largest_of_rows(x, exponents, SIDE: gl.constexpr):
    """The largest of each row, to the eight bits of bfloat16: where rows move it need not be more."""
    words = _words_of_thread(gl.max(_pairs_of_tokens(exponents), 1), TWO_TO_BFLOAT16)
    words = _folded_to_two_rows(words, "max.bf16x2")
    of_warps = x.most.index(SIDE)
    of_warps.store(words.reshape([4, ROWS // 2]))
    words = of_warps.load(gl.BlockedLayout([4, 1], [1, 32], [4, 1], [0, 1]))
    even, odd = gl.inline_asm_elementwise(
        TWO_FROM_BFLOAT16, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )
    rows = gl.join(gl.max(even, 0), gl.max(odd, 0)).reshape([ROWS])
    return gl.convert_layout(rows, _two_rows(), assert_trivial=True)


@gluon.jit
def _largest_of_thread(exponents):
    """The largest of the exponents that each thread has."""
    parts = exponents.reshape([BLOCK // 16, 2, 8, ROWS // 8, 4, 2])
    return gl.max(gl.max(gl.max(parts, 5), 3), 1)


@gluon.jit
def _spare(highest):
    """What rows that move leave for larger scores. Exponents of more than three digits may exceed what bfloat16 says of
    them by more than that."""
    return SPARE + gl.maximum(gl.abs(highest) * 2.0**-8 - SPARE - SLACK, 0.0)


@gluon.jit
def _minus(s, m):
    """s - m, a few rows at a time: registers are short. m: in shared memory, of each row."""
    N: gl.constexpr = s.shape[1]
    if N > QUARTER:
        s0, s1 = _halves(s)
        s0 = _minus(s0, m.slice(0, N // 2, dim=0))
        s1 = _minus(s1, m.slice(N // 2, N // 2, dim=0))
        return _joined(s0, s1)
    else:
        return s - m.load(gl.SliceLayout(0, s.type.layout))[None, :]


@gluon.jit
def _counted_from(x, bar, b, begins):
    """What exponents of block b count from if no row moves, in shared memory, when the other group has said so."""
    other = (b + 1) & 1
    mbarrier.wait(bar.m.index(other), (((b + 1) >> 1) & 1) ^ 1)
    return x.m.index(gl.where(begins, 2, other))  # the last are zeros


@gluon.jit
def _tell(x, bar, exponents, before, total, b, begins, unsure, SIDE: gl.constexpr):
    """Exponents of block b, and the sums of blocks before, both counted from what is told to the other group and, as
    alpha, to ``_values``.

    before: what they count from if no row moves. begins: b is the first block of its item. unsure: some rows may not
    have seen a token yet. Those count from 0, and their alpha is 2, which none is that multiplies something.
    """
    other = (b + 1) & 1
    buffer = b & 1
    m = before.load(_two_rows())
    alpha_before = x.alpha.index(other).load(_two_rows())
    alpha = gl.full((ROWS,), 1.0, gl.float32, _two_rows())
    mbarrier.wait(bar.p_empty.index(buffer), ((b >> 1) & 1) ^ 1)
    x.alpha.index(buffer).store(alpha)
    x.m.index(buffer).store(m)
    if _any_thread(_largest_of_thread(exponents) > SLACK, SIDE) | begins | unsure:
        fresh = begins | (alpha_before == FRESH)
        highest = _largest_of_rows(x, exponents, SIDE)
        rise = gl.where((highest >= SLACK) | fresh, highest + _spare(highest), 0.0)
        rise = gl.where(highest == float("-inf"), 0.0, rise)
        alpha = gl.where(fresh, gl.where(highest == float("-inf"), FRESH, 1.0), gl.exp2(-rise))
        x.alpha.index(buffer).store(alpha)
        x.m.index(buffer).store(m + rise)
        x.rise.index(SIDE).store(rise)
        mbarrier.arrive(bar.m.index(buffer), count=1)  # others wait for it
        exponents = _minus(exponents, x.rise.index(SIDE))
    else:
        mbarrier.arrive(bar.m.index(buffer), count=1)
    both = gl.convert_layout(alpha_before * alpha, gl.SliceLayout(0, _sums_of_warps()))[None, :]
    total = gl.where(begins, 0.0, total * both)  # of what an earlier item has left nothing is known
    return exponents, total
