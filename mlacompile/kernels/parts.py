"""Parts of sums that several programs have made are added up, and dropped from L2 when they have been read."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mlacompile.kernels.drop import _drop


@triton.jit
def _add_parts(p_part, stride_p, p_out, block, SIZE, PARTS: tl.constexpr, BLOCK: tl.constexpr, DROP: tl.constexpr,
               THREADS: tl.constexpr):  # fmt: skip
    """Add up a block of SIZE float32 elements, in the order of PARTS parts, stride_p apart. DROP: and drop the parts,
    which are whole lines then."""
    o = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(p_part + o, mask=o < SIZE, other=0.0)
    for i in tl.static_range(1, PARTS):
        acc += tl.load(p_part + i * stride_p + o, mask=o < SIZE, other=0.0)
    tl.store(p_out + o, acc.to(p_out.dtype.element_ty), mask=o < SIZE)
    if DROP:
        tl.debug_barrier()  # all warps have what they loaded
        LINES: tl.constexpr = BLOCK // 32
        for first in tl.static_range(0, PARTS * LINES, THREADS):
            i = first + tl.arange(0, THREADS)
            element = block * BLOCK + i % LINES * 32
            _drop(p_part + (i // LINES).to(tl.int64) * stride_p + element, (i < PARTS * LINES) & (element < SIZE))
