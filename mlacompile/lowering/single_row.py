"""Products with one row on CUDA: decoding one sequence reads every weight once, to use it once.

    mm(x [1, K], wᵀ)                  →  mlacompile::row_product, with the norm before it, and the residual or the gate
    fp8_linear(x, None, w, descale)      after it
    bmm(x [H, 1, K], w)               →  mlacompile::head_product

where a kernel takes them: libraries tile such a product for a matrix unit that has nothing to do, and read small
weights at a fraction of the memory bandwidth.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import mlacompile.ops.fp8_linear  # noqa: F401  (registers the op that is looked for)
from mlacompile.kernels import registry
from mlacompile.lowering.around_row import After, Norm, gate_after, gate_of, norm_before, sum_after, through_views
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten
_FP8_LINEAR = torch.ops.mlacompile.fp8_linear.default

#: Views by their schema that copy what is not contiguous.
_MAY_COPY = {aten.reshape.default, aten.contiguous.default}
#: Below this many weight elements a launch costs more than the reading.
SMALLEST = 1 << 18


def place_row_products(gm: GraphModule, constant: Collection[Node] = ()) -> int:
    """Replace the products of a functional ATen graph that have one row on a CUDA device; returns how many.

    Products of the same row become one call. What stands around them goes into it where the kernel takes that too.
    constant: the inputs that nobody writes.
    """
    placed = 0
    behind = _behind_attention(gm)
    for products in list(_by_row(gm)):
        norm = norm_before(products[0].x)
        early = products[0].node in behind and all(_is_view_of(p.weight, constant) for p in products)
        early = early and not _of_heads(products[0].x)
        for call in _calls(products):
            placed += _place(call, norm, early) or (norm is not None and _place(call, None, early))
    return placed


def place_head_products(gm: GraphModule, constant: Collection[Node] = ()) -> int:
    """Replace the batched products of one row each on a CUDA device; returns how many. constant: as above."""
    placed = 0
    behind = _behind_attention(gm)
    for node in gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
        x, weight = node.args
        if not _one_row(node.meta.get("val"), 1) or weight.meta["val"].numel() < SMALLEST:
            continue
        values = x.meta["val"], weight.meta["val"]
        kernel = next((k for k in registry.kernels("head_product") if not k.supports(*values)), None)
        if kernel is not None:
            emit = Emitter(node)
            early = node in behind and _is_view_of(weight, constant)
            made = emit(torch.ops.mlacompile.head_product.default, x, weight, early=early, impl=kernel.name)
            node.replace_all_uses_with(made)
            gm.graph.erase_node(node)
            placed += 1
    return placed


def _behind_attention(gm: GraphModule) -> set[Node]:
    """All nodes that depend on a decoding attention.

    What stands before a graph on its stream, an update of a weight perhaps, has ended when its first kernels begin;
    those behind attention may begin early without asking.
    """
    behind: set[Node] = set()
    for node in gm.graph.nodes:
        decodes = node.op == "call_function" and node.target is torch.ops.mlacompile.mla_decode.default
        if decodes or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    return behind


def _of_heads(row: Node) -> bool:
    """Whether a row is what the absorbed product after attention made.

    That one begins while attention runs, and a second kernel that waits with its weights in registers takes the room of
    what attention still has to launch: measured, it costs more than it gains (docs/kernels.md).
    """
    return through_views(row).target in (aten.bmm.default, torch.ops.mlacompile.head_product.default)


def _is_view_of(node: Node, constant: Collection[Node]) -> bool:
    """Whether a weight is the very memory of one of these inputs: no kernel of the graph makes it."""
    while node not in constant:
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        source: Any = node.args[0]
        alias = node.target._schema.arguments[0].alias_info
        copies = node.target in _MAY_COPY and not source.meta["val"].is_contiguous()
        if alias is None or alias.is_write or copies:
            return False
        node = source
    return True


@dataclass(frozen=True)
class _Product:
    """``node`` is ``x`` [1, K] times the transpose of ``weight`` [N, K], which is FP8 if it has a ``descale``."""

    node: Node
    weight: Node
    descale: Node | None = None

    @property
    def x(self) -> Node:
        """The row; read anew each time, for it may be replaced."""
        return self.node.args[0]  # type: ignore[return-value]


@dataclass
class _Call:
    """Products that become one call, and what follows them and becomes part of it."""

    products: list[_Product] = field(default_factory=list)
    after: After | None = None

    @property
    def results(self) -> list[Node]:
        """The nodes that the results of the call replace."""
        return [p.node for p in self.products] if self.after is None else [self.after.node]


def _calls(products: list[_Product]) -> Iterator[_Call]:
    """The calls that products of one row make: each gated pair, each with a residual, and the others together."""
    rest = list(products)
    for i, first in enumerate(products):
        for second in products[i + 1 :]:
            after = gate_after(first.node, second.node)
            if after is not None and first.weight.meta["val"].shape == second.weight.meta["val"].shape:
                yield _Call([first, second] if gate_of(after, first.node) else [second, first], after)
                rest = [p for p in rest if p is not first and p is not second]
    for product in list(rest):
        after = sum_after(product.node)
        if after is not None:
            yield _Call([product], after)
            rest.remove(product)
    if rest:
        yield _Call(rest)


def _place(call: _Call, norm: Norm | None, early: bool) -> int:
    """Write one call into the graph, if a kernel takes it; returns how many products it does."""
    results, after = call.results, call.after or After(call.products[0].node)
    emit = Emitter(results[0])
    weights = [p.weight for p in call.products]
    descales = [p.descale for p in call.products if p.descale is not None]
    x = call.products[0].x if norm is None else norm.x
    # Nodes that turn out to be of no use are dead code.
    row = emit.view(x, [1, weights[0].meta["val"].shape[1]])
    factor = None if norm is None else emit.view(norm.weight, [row.meta["val"].shape[1]])
    added = None if after.added is None else emit.view(after.added, [1, weights[0].meta["val"].shape[0]])
    arguments: tuple[Any, ...] = (row, weights, descales, factor, added)
    settings = {"eps": 0.0 if norm is None else norm.eps, "gate": after.gate, "early": early}
    values = torch.fx.map_arg(arguments, lambda n: n.meta["val"])
    kernel = next((k for k in registry.kernels("row_product") if not k.supports(*values, **settings)), None)
    if kernel is None:
        return 0
    made = emit(torch.ops.mlacompile.row_product.default, *arguments, **settings, impl=kernel.name)
    found = [emit.view(emit(operator.getitem, made, i), list(r.meta["val"].shape)) for i, r in enumerate(results)]
    for result, new in zip(results, found, strict=True):
        result.replace_all_uses_with(new)
        emit.graph.erase_node(result)
    return len(call.products)


def _by_row(gm: GraphModule) -> Iterator[list[_Product]]:
    """The products of the graph, in order; those that can be one call, where the first of them is, together."""
    rows: dict[tuple[Any, ...], list[_Product]] = {}
    for product in _products(gm):
        # What is not an input may come into being only after the first product of its row.
        made = [n for n in (product.weight, product.descale) if n is not None and n.op != "placeholder"]
        rows.setdefault((product.x, product.descale is None, *made), []).append(product)
    yield from rows.values()


def _products(gm: GraphModule) -> Iterator[_Product]:
    """Products of one static row with the transpose of a large matrix."""
    for node in gm.graph.nodes:
        product = _product(node) if node.op == "call_function" else None
        if product is None or not _one_row(node.meta.get("val"), 0):
            continue
        if product.weight.meta["val"].numel() >= SMALLEST:
            yield product


def _product(node: Node) -> _Product | None:
    if node.target is aten.mm.default and node.args[1].target is aten.t.default:  # type: ignore[union-attr]
        return _Product(node, node.args[1].args[0])  # type: ignore[union-attr,arg-type]
    if node.target is not _FP8_LINEAR or node.args[1] is not None:  # a row that is quantized stays so, bit for bit
        return None
    x, _, weight, descale, dtype = node.args
    alike = weight.meta["val"].dim() == 2 and x.meta["val"].dtype == dtype  # type: ignore[union-attr]
    return _Product(node, weight, descale) if alike else None  # type: ignore[arg-type]


def _one_row(value: Any, dim: int) -> bool:
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return False
    return not any(isinstance(s, torch.SymInt) for s in value.shape) and value.shape[dim] == 1
