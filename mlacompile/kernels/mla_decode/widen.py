"""FP8 values to 16 bits, four in a word: the code that does it, and the layouts in which words are moved."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _widened(fp8: str, wide: str, scaled: bool) -> str:
    """PTX: four FP8 values $2, times a float32 factor $3 if scaled, as two words $0 and $1 of two 16-bit values.

    float16 holds every FP8 value, so there is one rounding at most, that of the product.
    """
    lines = [".reg .b16 a0, a1, h0, h1;", ".reg .b32 x0, x1;", ".reg .f32 u, v;", "mov.b32 {a0, a1}, $2;"]
    for i in range(2):
        exact = not scaled and wide == "f16"
        lines.append(f"cvt.rn.f16x2.{fp8}x2 {f'${i}' if exact else f'x{i}'}, a{i};")
        if not exact:
            lines += [f"mov.b32 {{h0, h1}}, x{i};", "cvt.f32.f16 u, h0;", "cvt.f32.f16 v, h1;"]
            lines += ["mul.f32 u, u, $3;", "mul.f32 v, v, $3;"] if scaled else []
            lines.append(f"cvt.rn.{wide}x2.f32 ${i}, v, u;")
    return "{ " + " ".join(lines) + " }"


#: PTX by what the cache holds, what the products take, and whether values are multiplied.
WIDEN = {
    (fp8, wide, scaled): _widened(short, name, scaled)
    for fp8, short in ((torch.float8_e4m3fn, "e4m3"), (torch.float8_e5m2, "e5m2"))
    for wide, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16"))
    for scaled in (False, True)
}


@gluon.constexpr_function
def _in_words(layout):
    return gl.NVMMASharedLayout(swizzle_byte_width=layout.swizzle_byte_width, element_bitwidth=32, rank=2)


@gluon.constexpr_function
def _rows_of_words(words):
    """Rows of words, two words a thread: what is stored as 16 bytes a thread meets no bank twice."""
    across = min(words // 2, 32)
    return gl.BlockedLayout([1, 2], [32 // across, across], [4, 1], [1, 0])
