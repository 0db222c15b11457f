"""Products with one row on a CPU: nothing counts but the weight's way from memory, so it is read as memory likes it.

    mm(x [1, K], wᵀ [K, N])          →  G sums over K of w * x, each of N/G neighbouring rows of w
    bmm(x [H, 1, K], wᵀ [H, K, N])   →  the same for every head
    bmm(x [H, 1, K], w [H, K, N])    →  as it is: what it sums lies far apart, and a library knows how to read that

Inductor makes one loop of the G sums, so that a thread reads G rows at a time, far apart: what fetches ahead of a
thread stops at the end of a page, and while one row waits the others go on. A library reads row after row, the rows of
a ``mm`` on a single thread. What stands before and after the sums becomes part of their loops.

Where Inductor does not follow, nobody would fuse a product with its sum. There the rows of a ``mm`` become G groups of
a batched product, whose groups a library shares among threads.

Products that stay become ``baddbmm`` with beta 0: Inductor writes a ``bmm`` of one row out as a sum of products, each
read once in steps of a whole row. In 16 bits the library's product of a row uses all threads as it is, so only float32
is taken apart. Measured in docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mlacompile.passes.emit import Emitter

aten = torch.ops.aten

#: Groups of rows a library gets: more than any small machine has threads, few enough to stay long.
_GROUPS = (16, 8, 4, 2)
#: Rows that a thread reads at a time: beyond four nothing is gained, and processors follow only so many.
_STREAMS = (4, 2)
#: Below this many weight elements there is nothing to share among threads.
SMALLEST = 1 << 16


def place_cpu_rows(gm: GraphModule, *, fused: bool = True) -> int:
    """Rewrite the products of a functional ATen graph that have one static row on a CPU; returns how many.

    fused: whether Inductor compiles the graph.
    """
    placed = 0
    for target in (aten.mm.default, aten.bmm.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if not _has_one_row(node):
                continue
            emit = Emitter(node)
            new = _summed(emit, *node.args) if fused else None
            if new is None:
                new = _grouped(emit, *node.args) if target is aten.mm.default else _product(emit, *node.args)
            if new is not None:
                node.replace_all_uses_with(new)
                gm.graph.erase_node(node)
                placed += 1
    return placed


def _has_one_row(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    sizes: list[Any] = [*value.shape, node.args[0].meta["val"].shape[-1]]  # type: ignore[union-attr]
    return all(isinstance(s, int) for s in sizes) and sizes[-3] == 1


def _groups(right: Node, numbers: tuple[int, ...]) -> int | None:
    """Into how many equal groups of rows to cut the large float32 right operand [(H,) K, N] of a product, if it lies as
    rows of K."""
    value = right.meta["val"]
    if value.dtype != torch.float32 or value.numel() < SMALLEST or value.stride(-2) != 1:
        return None
    return next((g for g in numbers if value.shape[-1] % g == 0), None)


def _summed(emit: Emitter, x: Node, right: Node) -> Node | None:
    """The product as sums, [(H,) 1, N]; None where that would not gain."""
    groups = _groups(right, _STREAMS)
    if groups is None:
        return None
    rows = emit(aten.transpose.int, right, -2, -1)
    size = rows.meta["val"].shape[-2] // groups
    parts = [emit.narrow(rows, rows.meta["val"].dim() - 2, i * size, size) for i in range(groups)]
    sums = [emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, part, x), [-1]) for part in parts]
    return emit(aten.unsqueeze.default, emit(aten.cat.default, sums, -1), -2)


def _grouped(emit: Emitter, x: Node, right: Node) -> Node | None:
    """``mm(x [1, K], right [K, N])`` as a batched product; None where that would not gain."""
    groups = _groups(right, _GROUPS)
    if groups is None or not right.meta["val"].t().is_contiguous():
        return None
    k, n = right.meta["val"].shape
    rows = emit.view(emit.permute(right, [1, 0]), [groups, n // groups, k])
    same = emit(aten.expand.default, emit(aten.unsqueeze.default, x, 0), [groups, 1, k])
    return emit.view(_product(emit, same, emit.permute(rows, [0, 2, 1])), [1, n])


def _product(emit: Emitter, left: Node, right: Node) -> Node:
    value = left.meta["val"]
    unread = emit(aten.empty.memory_format, [1, 1, 1], dtype=value.dtype, device=value.device)
    return emit(aten.baddbmm.default, unread, left, right, beta=0)
