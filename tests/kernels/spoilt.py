"""In Triton's interpreter lines cannot be dropped; here they are spoilt, so that who reads them later says so."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spoil(p, mask):  # type: ignore[no-untyped-def]
    """In place of ``_drop``: there is NaN in all of a line."""
    VALUES: tl.constexpr = 1024 // p.dtype.element_ty.primitive_bitwidth
    o = tl.arange(0, VALUES)
    tl.store(p[:, None] + o[None, :], float("nan"), mask=mask[:, None] & (o >= 0)[None, :])
