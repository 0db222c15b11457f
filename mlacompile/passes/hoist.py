"""Stage 6: what depends on weights alone is computed once a version of the weights, not once a step.

    before   q, descale = fp8_quantize_weight(w)         in the graph, run on every call
    after    q, descale are inputs of the graph          and a Hoisted says how to make them of input w

Only ops whose result is worth its memory are taken out: those of _TARGETS, and nodes that are marked. Who calls the
graph keeps the values (see
``lowering/derived.py``): weights stay inputs, so a graph that serves several layers gets each layer's own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import mlacompile.ops.fp8_linear  # noqa: F401  (registers the ops below)
from mlacompile.passes.cone import dynamic_nodes

_TARGETS = {
    torch.ops.mlacompile.fp8_quantize_weight.default,
    torch.ops.mlacompile.fp8_dequantize_weight.default,
}
#: In the ``meta`` of any other node that a pass wants to be taken out.
HOISTED = "hoisted"
#: The same, but only where all weights say when they change; those made in inference mode do not.
HOISTED_IF_TRACKED = "hoisted if tracked"
#: Marks an input whose address never changes, as Dynamo marks parameters: CUDA graphs copy all others.
_STATIC = {"_dynamo_static_input_type": "unguarded"}


@dataclass(frozen=True)
class Hoisted:
    """A part of a graph that was taken out of it.

    sources: positions of the weights among the inputs of the graph. make: those weights → a tuple of tensors, which
    the graph has as inputs instead, behind its own. key: equal for parts that compute the same.
    """

    sources: tuple[int, ...]
    make: GraphModule
    key: str


def hoist(
    gm: GraphModule, weights: set[Node], untracked: frozenset[Node] = frozenset()
) -> tuple[list[Hoisted], list[Any]]:
    """Take every call that is to be hoisted, and depends on ``weights`` alone, out of ``gm``, in place.

    untracked: those of the weights that do not tell when they change.
    Returns the parts, and an example (fake) of every new input, in order.
    """
    graph = gm.graph
    graph.eliminate_dead_code()
    inputs = list(graph.find_nodes(op="placeholder"))
    dynamic = dynamic_nodes(graph, weights)
    calls = [n for n in graph.nodes if n not in dynamic and _wanted(n, weights - untracked)]
    parts = [_part(call, inputs) for call in calls]  # all before the first is replaced: one may feed another
    examples: list[Any] = []
    last = inputs[-1] if inputs else None
    for call in calls:
        for old, value in _results(call):
            with graph.inserting_after(last):
                new = last = graph.placeholder(f"derived_{len(examples)}")
            new.meta = {"val": value, "tensor_dict": dict(_STATIC)}
            examples.append(value)
            for node in old:
                node.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    gm.recompile()
    return parts, examples


def _results(call: Node) -> list[tuple[list[Node], Any]]:
    """For every tensor a call returns: the nodes that stand for it, and its fake value."""
    value = call.meta["val"]
    if isinstance(value, torch.Tensor):
        return [([call], value)]
    picks = [n for n in call.users if n.target is operator.getitem]
    return [([n for n in picks if n.args[1] == i], v) for i, v in enumerate(value)]


def _wanted(node: Node, tracked: set[Node]) -> bool:
    if node.target in _TARGETS or HOISTED in node.meta:
        return True
    if HOISTED_IF_TRACKED not in node.meta:
        return False
    leaves = {n for n in behind(node) if n.op != "call_function"}
    return bool(leaves) and leaves <= tracked


def behind(call: Node) -> set[Node]:
    """A node and all it is computed from."""
    needed: set[Node] = set()
    stack = [call]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    return needed


def _part(call: Node, inputs: Sequence[Node]) -> Hoisted:
    """The call and all it is computed from, as a graph of its own."""
    needed = behind(call)
    order = [n for n in call.graph.nodes if n in needed]
    part = Graph()
    copies: dict[Node, Node] = {}
    for i, node in enumerate(order):
        copies[node] = part.node_copy(node, copies.__getitem__)
        copies[node].name = f"n{i}"
    results = copies[call]
    if not isinstance(call.meta["val"], torch.Tensor):
        part.output(tuple(part.call_function(operator.getitem, (results, i)) for i in range(len(call.meta["val"]))))
    else:
        part.output((results,))
    sources = tuple(inputs.index(n) for n in order if n.op == "placeholder")
    return Hoisted(sources, GraphModule({}, part), _key(order))


def _key(order: Sequence[Node]) -> str:
    number = {node: i for i, node in enumerate(order)}

    def encode(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return "(" + ",".join(map(encode, value)) + ")"
        if isinstance(value, dict):
            return encode(sorted(value.items()))
        return f"%{number[value]}" if isinstance(value, Node) else repr(value)

    return ";".join(
        "in" if n.op == "placeholder" else f"{n.target}{encode(n.args)}{encode(dict(n.kwargs))}" for n in order
    )
