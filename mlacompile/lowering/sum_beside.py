"""Parts of a product are added up by the call that quantizes some of its columns, and the others beside them.

    both = fp8_normed(x, …, [w_dq, w_dkv])          both = fp8_normed(x, …, [w_dq, w_dkv], parts = 7)
    q, s = quantize_rows(both[:, :1536], w)    →    q, s, kv = quantize_rows(both, w, parts = True, beside = 576)
    kv   = both[:, 1536:]

A product with few columns is cut along K to keep a device busy, and its parts are added up by a launch of their own,
unless who reads the result can do that on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import mlacompile.ops.fp8_normed
import mlacompile.ops.quantize_rows  # noqa: F401  (both register an op)
from mlacompile.kernels import registry
from mlacompile.kernels.fp8_linear.stream_tiles import stream_parts
from mlacompile.lowering.stack_products import reshape_anew
from mlacompile.lowering.stretches import stretch_of
from mlacompile.passes.emit import Emitter
from mlacompile.passes.pull import RESHAPES

aten = torch.ops.aten
_FP8_NORMED = torch.ops.mlacompile.fp8_normed.default
_QUANTIZE_ROWS = torch.ops.mlacompile.quantize_rows.default


@dataclass(frozen=True)
class Columns:
    """A node that is columns [begin, end) of a product, perhaps in another shape."""

    node: Node
    begin: int
    end: int


def sum_beside_rows(gm: GraphModule) -> int:
    """Write such calls into a functional ATen graph, where kernels take them; returns how many."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    return sum(_joined(node, order) for node in gm.graph.find_nodes(op="call_function", target=_FP8_NORMED))


def _joined(product: Node, order: dict[Node, int]) -> bool:
    read: list[Columns] = []
    for columns in _columns(product, product.meta["val"].shape[1]):
        if columns is None:
            return False
        read.append(columns)
    quantized = [(columns, rows) for columns in read if columns.begin == 0 and (rows := _only_rows(columns.node))]
    if len(quantized) != 1:
        return False
    first, rows = quantized[0]
    others = [columns for columns in read if columns is not first]
    weight: Any = rows.args[2]
    while weight.op == "call_function" and weight.target in RESHAPES:
        weight = weight.args[0]
    late = order.get(weight, len(order)) > order[product]
    if late or not others or any(columns.begin < first.end for columns in others):
        return False
    return _write(product, first, rows, weight, others)


def _write(product: Node, first: Columns, rows: Node, weight: Node, others: list[Columns]) -> bool:
    """Both calls, if kernels take them, in place of the product."""
    *arguments, dtype = product.args
    values: Any = map_arg(tuple(arguments), lambda n: n.meta["val"])
    m, n = product.meta["val"].shape
    parts = stream_parts(m, n, values[0].shape[1], values[0].device)
    settings = {"eps": product.kwargs["eps"], "parts": parts}
    kernel, _ = registry.best("fp8_normed", *values, dtype, **settings)
    if parts == 1 or kernel is None or kernel.slower(*values, dtype, **settings):
        return False
    emit = Emitter(product.next)
    summed = {"eps": rows.kwargs.get("eps", 0.0), "gate": "", "parts": True, "beside": n - first.end, "dtype": dtype}
    norm = emit.view(weight, [first.end])
    both = product.meta["val"].new_empty((parts, m, n), dtype=torch.float32)
    adds, _ = registry.best("quantize_rows", both, None, norm.meta["val"], None, **summed)
    if adds is None:
        return False
    made = emit(_FP8_NORMED, *product.args, **settings, impl=kernel.name)
    again = emit(_QUANTIZE_ROWS, made, None, norm, None, **summed, impl=adds.name)
    rows.replace_all_uses_with(again)  # the first two results are what it returned
    rows.graph.erase_node(rows)
    beside = emit(operator.getitem, again, 2)
    for columns in others:
        part = emit.narrow(beside, 1, columns.begin - first.end, columns.end - columns.begin)
        part = emit.view(part, list(columns.node.meta["val"].shape))
        columns.node.replace_all_uses_with(part)
        reshape_anew(part, emit)
    return True


def _columns(node: Node, n: int) -> Iterator[Columns | None]:
    """What reads which columns of n; None for what reads them in another way."""
    last = len(node.meta["val"].shape) - 1
    for user in node.users:
        if user.target in RESHAPES and user.meta["val"].shape[-1] == n:
            yield from _columns(user, n)
            continue
        for part in user.users if user.target is aten.split_with_sizes.default else (user,):
            stretch = stretch_of(part)
            if stretch is None or stretch[:2] != (node, last):
                yield None
            else:
                yield Columns(part, stretch[2], stretch[2] + part.meta["val"].shape[last])


def _only_rows(node: Node) -> Node | None:
    """The call that quantizes rows behind a norm, if nothing else reads a node."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is _QUANTIZE_ROWS:
            _, added, norm, gated, *more = (*user.args, None, None, None)
            plain = added is gated is None and not any(m is not None for m in more) and not user.kwargs.get("squares")
            return user if plain and norm is not None and user.args[0] is node else None
        if user.op != "call_function" or user.target not in RESHAPES:
            return None
        node = user
    return None
