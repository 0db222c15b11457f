"""FP8 values to float16, four in a word: the code that does it, and the layouts in which words are moved."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _widened(fp8: str, scaled: bool) -> str:
    """PTX: four FP8 values $2, times a factor that both halves of $3 hold if scaled, as two words $0 and $1.

    float16 holds every FP8 value, so there is one rounding at most, that of the product.
    """
    lines = [".reg .b16 a0, a1;", "mov.b32 {a0, a1}, $2;"]
    for i in range(2):
        lines.append(f"cvt.rn.f16x2.{fp8}x2 ${i}, a{i};")
        lines += [f"mul.rn.f16x2 ${i}, ${i}, $3;"] if scaled else []
    return "{ " + " ".join(lines) + " }"


#: PTX by what the cache holds and whether values are multiplied.
WIDEN = {
    (dtype, scaled): _widened(name, scaled)
    for dtype, name in ((torch.float8_e4m3fn, "e4m3"), (torch.float8_e5m2, "e5m2"))
    for scaled in (False, True)
}
#: How much larger than one the largest factor of a token may be, so that its products fit into float16.
HEADROOM = {torch.float8_e4m3fn: 128.0, torch.float8_e5m2: 1.0}


@gluon.constexpr_function
def _in_words(layout):
    return gl.NVMMASharedLayout(swizzle_byte_width=layout.swizzle_byte_width, element_bitwidth=32, rank=2)


@gluon.constexpr_function
def _rows_of_words(words):
    """Rows of words, two words a thread: what is stored as 16 bytes a thread meets no bank twice."""
    across = min(words // 2, 32)
    return gl.BlockedLayout([1, 2], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def _twice(x):
    """float16 as words of two equal halves."""
    half = x.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return half | (half << 16)
