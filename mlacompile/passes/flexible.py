"""``flex_attention`` becomes ``mlacompile::attention`` where its functions say no more than which tokens are seen.

    score_mod    where(condition, score, -inf)  |  score             mask_mod    condition
                 ───────────────────────────────────────────────────────────────────────────
    mask         the conditions, computed on the indices of all batches, heads, queries and tokens at once

A mask function is traced on four numbers; on index tensors that broadcast it gives the whole mask. Nothing is computed
that way where the mask turns out to be a range of tokens (see ``visibility.py``).
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from mlacompile.passes.axes import shape_of
from mlacompile.passes.canonicalize import ORIGINAL
from mlacompile.passes.emit import Emitter
from mlacompile.passes.scores import scalar

aten = torch.ops.aten
_FLEX = torch.ops.higher_order.flex_attention
_MASK_FUNCTION = -1  # last in the tuple that describes blocks


def open_flexible(gm: GraphModule) -> None:
    """Replace every call of ``flex_attention`` that is no more than masked attention, in place."""
    for node in list(gm.graph.find_nodes(op="call_function", target=_FLEX)):
        _open(gm, node)


def _open(gm: GraphModule, node: Node) -> None:
    query, key, value, score_mod, blocks, scale, _, score_buffers, mask_buffers = (*node.args, (), ())[:9]
    shapes = [shape_of(n) for n in (query, key, value)]  # type: ignore[arg-type]
    outputs = {n.args[1]: n for n in node.users if n.target is operator.getitem}
    if not set(outputs) <= {0} or len(outputs) != len(node.users) or not outputs or None in shapes:
        return  # the log-sum-exp is asked for too
    if not isinstance(scale, (int, float)):
        return
    emit = Emitter(node)
    indices = _indices(emit, query, key)  # type: ignore[arg-type]
    functions = [_graph(gm, f) for f in (score_mod, blocks[_MASK_FUNCTION])]  # type: ignore[index]
    if functions[0] is None or functions[1] is None:
        return
    score = _conditions(functions[0])
    if score is None:
        return
    keep = [
        emit(aten.logical_not.default, mask) if hidden else mask
        for mask, hidden in _inlined(emit, functions[0], [None, *indices, *score_buffers], score)  # type: ignore[misc]
    ]
    (returned,) = functions[1].output_node().args
    keep += [m for m, _ in _inlined(emit, functions[1], [*indices, *mask_buffers], [(returned, False)])]  # type: ignore[misc,list-item]
    mask: Node | None = None
    for condition in keep:
        mask = condition if mask is None else emit(aten.logical_and.default, mask, condition)
    grouped = shapes[0][1] != shapes[1][1]  # type: ignore[index]
    attention = emit(torch.ops.mlacompile.attention.default, query, key, value, mask, False, float(scale), grouped)
    attention.meta[ORIGINAL] = outputs[0]
    out = emit(aten.clone.default, attention, memory_format=torch.contiguous_format)
    attention.meta["mlacompile_anchor"] = out
    outputs[0].replace_all_uses_with(out)


def _indices(emit: Emitter, query: Node, key: Node) -> list[Node]:
    """Numbers of batches, heads, queries and tokens, each along its own of four dimensions."""
    found = []
    for dim, (node, at) in enumerate(((query, 0), (query, 1), (query, 2), (key, 2))):
        device = node.meta["val"].device
        line = emit(aten.arange.default, emit.size(node, at), dtype=torch.int64, device=device)
        found.append(emit(aten.view.default, line, [-1 if i == dim else 1 for i in range(4)]))
    return found


def _graph(gm: GraphModule, function: Any) -> Graph | None:
    part = getattr(gm, str(function.target), None) if isinstance(function, Node) else None
    return part.graph if isinstance(part, GraphModule) else None


def _conditions(score_mod: Graph) -> list[tuple[Node, bool]] | None:
    """Conditions under which a score is kept (or, where True stands beside, hidden); None when it is changed."""
    score = score_mod.find_nodes(op="placeholder")[0]
    here: Any = score_mod.output_node().args[0]
    found: list[tuple[Node, bool]] = []
    while here is not score:
        if not isinstance(here, Node) or here.target is not aten.where.self:
            return None
        condition, yes, no = here.args
        for kept, low, hidden in ((yes, no, False), (no, yes, True)):
            if scalar(low) == -math.inf:
                found.append((condition, hidden))  # type: ignore[arg-type]
                here = kept
                break
        else:
            return None
    return found


def _inlined(
    emit: Emitter, function: Graph, arguments: list[Node | None], wanted: list[tuple[Node, bool]]
) -> list[tuple[Node, bool]]:
    """Nodes of a function's graph written into the emitter's, for these arguments."""
    known: dict[Node, Any] = dict(zip(function.find_nodes(op="placeholder"), arguments, strict=True))
    needed: set[Node] = set()
    stack = [n for n, _ in wanted]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    for node in function.nodes:
        if node in needed and node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            known[node] = emit(node.target, *args, **kwargs)
    return [(known[n], hidden) for n, hidden in wanted if not _always(known[n]) or hidden]


def _always(condition: Node) -> bool:
    """Whether a mask function returns True whatever it is asked."""
    ones = condition.target in (aten.new_ones.default, aten.ones.default)
    full = condition.target is aten.full.default and condition.args[1] is True
    return ones or full
