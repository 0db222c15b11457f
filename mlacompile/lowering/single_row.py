"""Products with one row on CUDA: decoding one sequence reads every weight once, to use it once.

``mm(x [1, K], wᵀ)`` becomes ``mlacompile::row_product`` where a kernel takes it: libraries tile such a product for a
matrix unit that has nothing to do, and read small weights at a fraction of the memory bandwidth.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mlacompile.kernels import registry
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten

#: Below this many weight elements a launch costs more than the reading.
SMALLEST = 1 << 18


def place_row_products(gm: GraphModule) -> int:
    """Replace the products of a functional ATen graph that have one row on a CUDA device; returns how many.

    Products of the same row, such as a gate and what it gates, become one call.
    """
    placed = 0
    for products in _by_row(gm):
        x, weights = products[0].x, [p.weight for p in products]
        values = x.meta["val"], [w.meta["val"] for w in weights]
        kernel = next((k for k in registry.kernels("row_product") if not k.supports(*values)), None)
        if kernel is None:
            continue
        emit = Emitter(products[0].node)
        call = emit(torch.ops.mlacompile.row_product.default, x, weights, impl=kernel.name)
        rows = [emit(operator.getitem, call, i) for i in range(len(products))]
        for product, row in zip(products, rows, strict=True):
            product.node.replace_all_uses_with(row)
            gm.graph.erase_node(product.node)
        placed += len(products)
    return placed


@dataclass(frozen=True)
class _Product:
    """``node`` is ``x`` [1, K] times the transpose of ``weight`` [N, K]; read anew each time, for x may be replaced."""

    node: Node

    @property
    def x(self) -> Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def weight(self) -> Node:
        return self.node.args[1].args[0]  # type: ignore[union-attr,return-value]


def _by_row(gm: GraphModule) -> Iterator[list[_Product]]:
    """The products of the graph, in order; those that can be one call, where the first of them is, together."""
    rows: dict[tuple[Node, ...], list[_Product]] = {}
    for product in _products(gm):
        # What is not an input may come into being only after the first product of its row.
        alone = () if product.weight.op == "placeholder" else (product.weight,)
        rows.setdefault((product.x, *alone), []).append(product)
    yield from rows.values()


def _products(gm: GraphModule) -> Iterator[_Product]:
    """Products of one static row with the transpose of a large matrix."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.mm.default):
        transposed = node.args[1]
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.device.type != "cuda" or isinstance(value.shape[0], torch.SymInt):
            continue
        if value.shape[0] != 1 or transposed.target is not aten.t.default:
            continue
        if transposed.args[0].meta["val"].numel() >= SMALLEST:
            yield _Product(node)
