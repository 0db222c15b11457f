"""Triton kernel that brings few rows into the order of their experts: every program counts for some of them.

A row's place is the number of rows that come before it: those of smaller experts, and those of the same one that stand
earlier. Where the rows of an expert begin is the number of rows of smaller ones. A sort, of any number of rows, is five
launches and more of the library, 13 µs for eight rows.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _expert_order_kernel(p_expert, p_order, p_starts, M, E, SOME: tl.constexpr, STEP: tl.constexpr):
    """Grid: (⌈M / SOME⌉ + ⌈(E + 1) / SOME⌉,): programs that place SOME rows each, then programs that say where SOME
    experts begin. p_expert: integers [M]. p_order: int32 [M]. p_starts: int32 [E + 1]."""
    of_rows = tl.cdiv(M, SOME)
    places = tl.program_id(0) < of_rows
    o_row = tl.program_id(0) * SOME + tl.arange(0, SOME)
    o_e = o_row - of_rows * SOME
    mine = tl.load(p_expert + o_row, mask=o_row < M, other=0).to(tl.int64)
    mine = tl.where(places, mine, o_e.to(tl.int64))
    count = tl.zeros((SOME,), tl.int32)
    for j in range(0, M, STEP):
        o_other = j + tl.arange(0, STEP)
        other = tl.load(p_expert + o_other, mask=o_other < M, other=0).to(tl.int64)
        before = other[None, :] < mine[:, None]
        before |= places & (other[None, :] == mine[:, None]) & (o_other[None, :] < o_row[:, None])
        count += tl.sum((before & (o_other < M)[None, :]).to(tl.int32), 1)
    tl.store(p_order + count, o_row, mask=places & (o_row < M))
    tl.store(p_starts + o_e, count, mask=(o_e >= 0) & (o_e <= E))
