"""Lines of L2 that nobody reads again are dropped, and not written to memory when something else takes their place.

A decode step streams hundreds of megabytes of weights through L2. What its kernels hand to one another is small beside
that, is read at once, and still costs memory a write, at a time when memory is the limit. ``discard.global.L2`` (PTX
ISA 7.4) says of a line of 128 bytes that its contents may be lost.

Who drops a line must be the last to read it, and all of the line must be what is dropped.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mlacompile.kernels.device import interpreted

LINE = 128  # bytes


def in_whole_lines(t: Tensor) -> bool:
    """Whether rows of a tensor, or of a part of one, begin where lines do, and none twice. Never where lines cannot be
    dropped."""
    apart = [t.stride(i) * t.itemsize for i in range(t.dim() - 1) if t.shape[i] > 1]
    begins = 0 if t.device.type == "meta" else t.data_ptr()
    return not interpreted() and begins % LINE == 0 and all(n and n % LINE == 0 for n in apart)


#: $1: the address of a line, or zero for none.
DROP = tl.constexpr("{ .reg .pred any; setp.ne.s64 any, $1, 0; @any discard.global.L2 [$1], 128; mov.u32 $0, 0; }")


@triton.jit
def _drop(p, mask):
    """Drop the lines at p where mask. All of their readers have read: of a program's own there is a barrier before."""
    at = tl.where(mask, p.to(tl.int64, bitcast=True), 0)
    tl.inline_asm_elementwise(DROP, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
