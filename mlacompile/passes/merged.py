"""Attention over operands of other than four dimensions gets four: ``[B · H, S, D]``, ``[H, S, D]``, ``[B, S, D]``, …

The axes of the queries and keys are followed back to where batch and heads were put together; a product with a weight
on the way tells which of the two is heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from mlacompile.passes.axes import Atom, Dims, broadcast_dims, dims_for, renamed, shape_of
from mlacompile.passes.canonicalize import ORIGINAL, attention_nodes
from mlacompile.passes.emit import Emitter
from mlacompile.passes.pull import upstream
from mlacompile.passes.scores import Factor, Product, Scores
from mlacompile.passes.softmax import heads_of

aten = torch.ops.aten


def give_four_axes(graph: Graph, dynamic: set[Node]) -> None:
    """Bring every attention op with three dimensions, or more than four, into ``[B, H, S, D]`` where that can be told.

    dynamic: nodes that depend on more than weights.
    """
    for node in attention_nodes(graph):
        if len(shape_of(node) or ()) not in (0, 4):
            _reshape(node, dynamic)


def _reshape(node: Node, dynamic: set[Node]) -> None:
    q, k, v, mask, causal, scale, grouped = node.args[:7]
    shapes = [shape_of(n) for n in (q, k, v)]  # type: ignore[arg-type]
    if None in shapes or len({s[:-2] for s in shapes}) != 1 or len({len(s) for s in shapes}) != 1:  # type: ignore[index,arg-type]
        return
    leading = _leading(q, k, shapes[0][:-2])  # type: ignore[arg-type,index]
    q_dims, k_dims, v_dims = (
        (*leading, *dims_for(s[-2:], (tokens, "D")))  # type: ignore[index]
        for s, tokens in zip(shapes, ("S", "T", "T"), strict=True)
    )
    names = _names(q, q_dims, k, k_dims, leading, dynamic)  # type: ignore[arg-type]
    if names is None:
        return
    emit = Emitter(node)
    operands = [
        emit.arrange(x, renamed(dims, names), order)  # type: ignore[arg-type]
        for x, dims, order in ((q, q_dims, "BHSD"), (k, k_dims, "BHTD"), (v, v_dims, "BHTD"))
    ]
    if isinstance(mask, Node):
        rows = *leading, *dims_for((shapes[0][-2], shapes[1][-2]), ("S", "T"))  # type: ignore[index]
        axes = broadcast_dims(mask, rows)
        if axes is None:
            return
        mask = emit.arrange(mask, renamed(axes, names), "BHST")
    attention = emit(torch.ops.mlacompile.attention.default, *operands, mask, causal, scale, grouped)
    out = emit.merge(attention, "BHSD", renamed((*q_dims[:-1], v_dims[-1]), names))
    out = emit(aten.clone.default, out, memory_format=torch.contiguous_format)
    original = emit(aten.scaled_dot_product_attention.default, q, k, v, node.args[3], 0.0, causal, scale=scale)
    original.meta = dict(node.meta)
    attention.meta = dict(node.meta) | {"val": attention.meta["val"], ORIGINAL: original, "mlacompile_anchor": out}
    node.replace_all_uses_with(out)
    graph = node.graph
    graph.erase_node(node)


def _leading(q: Node, k: Node, sizes: Sequence[Any]) -> Dims:
    """Axes of the dimensions before tokens and features, each taken apart where the queries or keys say so."""
    found: list[Any] = []
    for i, dim in enumerate(dims_for(sizes, [f"x{i}" for i in range(len(sizes))])):
        parts = dim
        for node, last in ((q, ("S", "D")), (k, ("T", "D"))):
            shape = shape_of(node) or ()
            names = [*(f"x{j}" for j in range(len(sizes))), *last]
            for _, dims in upstream(node, dims_for(shape, names)):
                atoms = [a for d in dims for a in d if a.label == f"x{i}"]
                if len(atoms) == 2 and len(parts) == 1:
                    parts = tuple(Atom(f"x{i}.{j}", a.size) for j, a in enumerate(atoms))
        found.append(parts)
    return tuple(found)


def _names(q: Node, q_dims: Dims, k: Node, k_dims: Dims, leading: Dims, dynamic: set[Node]) -> dict[str, str] | None:
    """Which of the leading axes is heads, and which is the batch."""
    candidates = [a.label for d in leading for a in d]
    scores = Scores([Product(q, q_dims, k, k_dims, Factor())])
    head = heads_of(scores, set(candidates), dynamic)
    rest = [x for x in candidates if x != head]
    if len(rest) > 1:
        return None
    return ({} if head is None else {head: "H"}) | dict.fromkeys(rest, "B")
