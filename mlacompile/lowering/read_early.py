"""How much of a cache is written is read once, before the first layer, and not by every layer in between.

    every layer     length ─► mla_prefill            waits until all before it is computed, then launches what follows
    once            length ─► visible_bounds ─► mla_prefill of every layer

A device that is asked for a number in the middle of its work runs dry: nothing can be launched until it has answered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import mlacompile.ops.visible_bounds  # noqa: F401  (registers the op)
from mlacompile.passes.emit import Emitter

PREFILL, BOUNDS = torch.ops.mlacompile.mla_prefill.default, torch.ops.mlacompile.visible_bounds.default


def read_early(gm: GraphModule) -> int:
    """Read what prompts need to know at the start of the graph; returns how many readings there are."""
    reads = [_reading(node) for node in gm.graph.find_nodes(op="call_function", target=PREFILL)]
    _to_the_start(gm.graph, [node for node in reads if node is not None])
    return len(gm.graph.find_nodes(op="call_function", target=BOUNDS))


def _reading(prefill: Node) -> Node | None:
    """Give one prompt's attention what it would read; None where it reads nothing."""
    mask, start, length = seen = prefill.args[5:8]
    if all(x is None for x in seen):
        return None
    emit, (q, c_kv) = Emitter(prefill), prefill.args[:2]
    bounds = emit(BOUNDS, mask, start, length, emit.size(q, 0), emit.size(c_kv, 1))  # type: ignore[arg-type]
    prefill.args = (*prefill.args[:8], bounds)
    return bounds


def _to_the_start(graph: Graph, reads: list[Node]) -> None:
    """Move nodes, with all they are computed from, before everything else; of equal ones one is left."""
    needed: set[Node] = set()
    stack = [node for node in reads if not any(_draws(n) for n in _behind(node))]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    anchor = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")][-1:]
    known: dict[Any, Node] = {}
    for node in [n for n in graph.nodes if n in needed and n.op == "call_function"]:
        same = known.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif anchor:
            anchor[0].append(node)
            anchor = [node]


def _behind(node: Node) -> set[Node]:
    found: set[Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one not in found:
            found.add(one)
            stack += one.all_input_nodes
    return found


def _draws(node: Node) -> bool:
    """Whether a node may yield something else when it is moved, or computed once instead of twice."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or (
        node.op == "call_function" and node.is_impure()
    )
