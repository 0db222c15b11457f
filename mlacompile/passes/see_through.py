"""Products that are in FP8 already are seen through, so that attention behind them can be recognised and absorbed.

    in the graph       y = fp8_linear(fp8_quantize(x), w, descale)
    for the recogniser y = mm(x, Wᵀ),  W = fp8_dequantize_weight(w, descale)

Quantizing x is not linear, and nothing could be absorbed through it. Where attention is absorbed, the product is gone
and the views are views of W, which is computed once a weight version (see ``hoist.py``). Everywhere else the FP8
product is put back.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

import mlacompile.ops.fp8_linear  # noqa: F401  (registers the ops that are looked for)
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten
_LINEAR = torch.ops.mlacompile.fp8_linear.default
_QUANTIZE = torch.ops.mlacompile.fp8_quantize.default


def see_through(graph: Graph, dynamic: set[Node]) -> list[tuple[Node, Node]]:
    """Put a linear product in the place of every FP8 product; returns both, to be put back.

    dynamic: nodes that depend on more than weights.
    """
    pairs = []
    for node in list(graph.find_nodes(op="call_function", target=_LINEAR)):
        x = _unquantized(node)
        q, descale = node.args[2:4]
        if x is None or q in dynamic or descale in dynamic:
            continue
        emit = Emitter(node.next)
        dtype = node.meta["val"].dtype
        weight = emit(torch.ops.mlacompile.fp8_dequantize_weight.default, q, descale, dtype)
        x = x if x.meta["val"].dtype == dtype else emit(aten._to_copy.default, x, dtype=dtype)
        linear = emit(aten.mm.default, x, emit(aten.t.default, weight))
        node.replace_all_uses_with(linear)
        pairs.append((linear, node))
    return pairs


def put_back(graph: Graph, pairs: list[tuple[Node, Node]]) -> None:
    """Put the FP8 product back wherever its stand-in is still needed."""
    needed: set[Node] = set()
    stack = [n for n in graph.nodes if n.is_impure()]  # outputs, inputs, writes
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    for stand_in, original in pairs:
        if stand_in in needed:
            stand_in.replace_all_uses_with(original)


def _unquantized(linear: Node) -> Node | None:
    """What was quantized to be the left factor, or None when that is not in the graph."""
    q, descale = linear.args[:2]
    if descale is None:
        return q  # type: ignore[return-value]
    if not isinstance(q, Node) or not isinstance(descale, Node):
        return None
    if q.target is not operator.getitem or descale.target is not operator.getitem or q.args[0] is not descale.args[0]:
        return None
    quantized: Node = q.args[0]  # type: ignore[assignment]
    return quantized.args[0] if quantized.target is _QUANTIZE else None  # type: ignore[return-value]
