"""Products with one row: decoding one sequence reads every weight once, to use it once.

On CUDA, ``mm(x [1, K], wᵀ)`` becomes ``mlacompile::row_product`` where a kernel takes it: libraries tile such a
product for a matrix unit that has nothing to do, and read small weights at a fraction of the memory bandwidth.
On a CPU, ``bmm([H, 1, K], …)`` becomes ``baddbmm`` with beta 0: Inductor writes the first out as a sum of products,
which is three times slower than the library call that the second remains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mlacompile.kernels import registry
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten

#: Below this many weight elements a launch costs more than the reading.
SMALLEST = 1 << 18


def place_row_products(gm: GraphModule) -> int:
    """Replace the products of a functional ATen graph that have one row on a CUDA device; returns how many."""
    placed = 0
    for node, x, weight in _products(gm):
        kernel = next(
            (k for k in registry.kernels("row_product") if not k.supports(x.meta["val"], weight.meta["val"])), None
        )
        if kernel is None:
            continue
        node.target = torch.ops.mlacompile.row_product.default
        node.args, node.kwargs = (x, weight), {"impl": kernel.name}
        placed += 1
    return placed


def keep_batched_rows(gm: GraphModule) -> int:
    """Leave batched products of one row on a CPU to the library; returns how many."""
    kept = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.device.type != "cpu" or isinstance(value.shape[1], torch.SymInt):
            continue
        if value.shape[1] == 1:
            emit = Emitter(node)
            unread = emit(aten.empty.memory_format, [1, 1, 1], dtype=value.dtype, device=value.device)
            node.target, node.args, node.kwargs = aten.baddbmm.default, (unread, *node.args), {"beta": 0}
            kept += 1
    return kept


def _products(gm: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """Products of one static row with the transpose of a large matrix: (node, x, weight)."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.mm.default):
        x, transposed = node.args
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.device.type != "cuda" or isinstance(value.shape[0], torch.SymInt):
            continue
        if value.shape[0] != 1 or transposed.target is not aten.t.default:
            continue
        weight = transposed.args[0]
        if weight.meta["val"].numel() >= SMALLEST:
            yield node, x, weight
