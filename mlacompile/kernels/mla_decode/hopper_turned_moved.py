"""Earlier output of ``hopper_turned.py`` in units of what exponents count from now.

Each row counts from the largest of its scores so far, and where that grows all earlier output of the row is to be
multiplied. Which rows moved is different for every block of tokens, and few do: scores are maxima less and less often.
So rows are looked at eight at a time, as many as lie side by side in a fragment, and only those that moved are
multiplied.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlacompile.kernels.mla_decode.hopper_rows import GROUP
from mlacompile.kernels.mla_decode.hopper_turned_room import _fragment


@gluon.jit
def _halves(x):
    """The first half of a fragment's columns and the second, each where it was."""
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = x.shape[1] // 2
    first, second = gl.split(x.reshape([rows, 2, columns]).permute((0, 2, 1)))
    layout: gl.constexpr = _fragment(columns, gl.num_warps())
    first = gl.convert_layout(first, layout, assert_trivial=True)
    return first, gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def _joined(first, second):
    """The opposite of ``_halves``."""
    rows: gl.constexpr = first.shape[0]
    columns: gl.constexpr = 2 * first.shape[1]
    both = gl.join(first, second).permute((0, 2, 1)).reshape([rows, columns])
    return gl.convert_layout(both, _fragment(columns, gl.num_warps()), assert_trivial=True)


@gluon.jit
def _halves_of_rows(x):
    """``_halves`` of what a fragment's columns have one of."""
    N: gl.constexpr = x.shape[0] // 2
    first, second = gl.split(x.reshape([2, N]).permute((1, 0)))
    layout: gl.constexpr = gl.SliceLayout(0, _fragment(N, gl.num_warps()))
    first = gl.convert_layout(first, layout, assert_trivial=True)
    return first, gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def _loaded(x):
    """x, which the compiler must not load later, one after another where each is used."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _multiplied(even0, odd0, even1, odd1, alpha, moved, TILES: gl.constexpr):
    """Output of a power of two of rows times alpha, group by group, where bit i of moved is set for group i."""
    layout: gl.constexpr = even0.type.layout
    N: gl.constexpr = even0.shape[1]
    if N > GROUP:
        a0, a1 = _halves(even0)
        b0, b1 = _halves(odd0)
        c0, c1 = a0, a1
        d0, d1 = b0, b1
        if TILES > 1:
            c0, c1 = _halves(even1)
            d0, d1 = _halves(odd1)
        alpha0, alpha1 = _halves_of_rows(alpha)
        a0, b0, c0, d0 = _multiplied(a0, b0, c0, d0, alpha0, moved, TILES)
        a1, b1, c1, d1 = _multiplied(a1, b1, c1, d1, alpha1, moved >> N // (2 * GROUP), TILES)
        even0 = gl.convert_layout(_joined(a0, a1), layout, assert_trivial=True)
        odd0 = gl.convert_layout(_joined(b0, b1), layout, assert_trivial=True)
        if TILES > 1:
            even1 = gl.convert_layout(_joined(c0, c1), layout, assert_trivial=True)
            odd1 = gl.convert_layout(_joined(d0, d1), layout, assert_trivial=True)
    else:
        factor = alpha[None, :]
        if moved & 1 != 0:
            even0 *= factor
            odd0 *= factor
            if TILES > 1:
                even1 *= factor
                odd1 *= factor
    return even0, odd0, even1, odd1


@gluon.jit
def _shrunk(even0, odd0, even1, odd1, alpha, moved, TILES: gl.constexpr):
    """Output in units of a new maximum. alpha: of its rows, in shared memory."""
    alpha = _loaded(alpha.load(gl.SliceLayout(0, even0.type.layout)))
    return _multiplied(even0, odd0, even1, odd1, alpha, moved, TILES)
