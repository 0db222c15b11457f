"""Products with one row on a CPU: a library reads weights at memory speed only when it is asked in its own terms.

    mm(x [1, K], wᵀ [K, N])   →  x times w cut into G groups of rows, [G, K, N/G]: each thread gets whole groups, where
                                 one product of a row runs on a single thread
    bmm(x [H, 1, K], w)       →  as it is: the heads are the groups

Both become ``baddbmm`` with beta 0: Inductor writes a ``bmm`` of one row out as a sum of products, several times slower
than the library call that the other remains. In 16 bits the library's product of a row uses all threads as it is, so
only float32 is regrouped. Measured in docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mlacompile.passes.emit import Emitter

aten = torch.ops.aten

#: Groups of rows a weight is cut into: more than any small machine has threads, few enough to stay long.
_GROUPS = (16, 8, 4, 2)
#: Below this many weight elements there is nothing to share among threads.
SMALLEST = 1 << 16


def place_cpu_rows(gm: GraphModule) -> int:
    """Rewrite the products of a functional ATen graph that have one static row on a CPU; returns how many."""
    placed = 0
    for target in (aten.mm.default, aten.bmm.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if not _has_one_row(node):
                continue
            emit = Emitter(node)
            new = _row(emit, *node.args) if target is aten.mm.default else _product(emit, *node.args)
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


def _row(emit: Emitter, x: Node, right: Node) -> Node | None:
    """``mm(x [1, K], right [K, N])`` whose right operand is large and lies as rows of K."""
    value = right.meta["val"]
    k, n = value.shape
    groups = next((g for g in _GROUPS if n % g == 0), None)
    if groups is None or k * n < SMALLEST or value.stride() != (1, k) or value.dtype != torch.float32:
        return None
    rows = emit.view(emit.permute(right, [1, 0]), [groups, n // groups, k])
    same = emit(aten.expand.default, emit(aten.unsqueeze.default, x, 0), [groups, 1, k])
    return emit.view(_product(emit, same, emit.permute(rows, [0, 2, 1])), [1, n])


def _product(emit: Emitter, left: Node, right: Node) -> Node:
    value = left.meta["val"]
    unread = emit(aten.empty.memory_format, [1, 1, 1], dtype=value.dtype, device=value.device)
    return emit(aten.baddbmm.default, unread, left, right, beta=0)
