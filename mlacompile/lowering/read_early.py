"""How much of a cache is written is read once, before the graph starts, and not by every layer in the middle of it.

    every layer     length ─► mla_prefill            waits until all before it is computed, then launches what follows
    once            length ─► visible_bounds ─► mla_prefill of every layer

A device that is asked for a number in the middle of its work runs dry: nothing can be launched until it has answered. A
reading that stays in the graph is put where Inductor finds it cheapest in memory, which is in the middle; so what it
needs, a few numbers made of the inputs, is computed before the graph is called, and the answer, still on its way to the
host, is one more input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import mlacompile.ops.visible_bounds  # noqa: F401  (registers the op)
from mlacompile.lowering.store_once import elements
from mlacompile.passes.emit import Emitter
from mlacompile.passes.hoist import behind

_FEW = 1 << 16  # values: what has more is better computed by the graph itself
PREFILL, BOUNDS = torch.ops.mlacompile.mla_prefill.default, torch.ops.mlacompile.visible_bounds.default


def read_early(gm: GraphModule) -> int:
    """Give prompts what they need to know, read at the start of the graph; returns how many readings there are."""
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
    stack = [node for node in reads if not any(_draws(n) for n in behind(node))]
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


@dataclass(frozen=True)
class Before:
    """What is computed before a graph is called. sources: which inputs of the graph it is made of. run: those → a tuple
    of further inputs. examples: of these."""

    sources: tuple[int, ...]
    run: GraphModule
    examples: tuple[Any, ...]


def take_out(gm: GraphModule) -> Before | None:
    """Take the readings out of a graph, in place, where they are made of small values; None: there are none."""
    graph, inputs = gm.graph, list(gm.graph.find_nodes(op="placeholder"))
    needs = {node: behind(node) for node in graph.find_nodes(op="call_function", target=BOUNDS)}
    reads = [node for node, needed in needs.items() if all(map(_is_small, needed))]
    if not reads:
        return None
    wanted = set().union(*(needs[node] for node in reads))
    part, copies = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        if node in wanted:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in reads))
    anchor = inputs[-1]
    for i, node in enumerate(reads):
        with graph.inserting_after(anchor):
            anchor = graph.placeholder(f"bounds_{i}")
        anchor.meta = {"val": node.meta["val"], "tensor_dict": {}}
        node.replace_all_uses_with(anchor)
    graph.eliminate_dead_code()
    gm.recompile()
    sources = tuple(i for i, node in enumerate(inputs) if node in wanted)
    return Before(sources, GraphModule({}, part), tuple(node.meta["val"] for node in reads))


def with_before(compiled: Callable[..., Any], before: Before | None) -> Callable[..., Any]:
    """``compiled``, called with what is computed before it behind its own arguments."""
    if before is None:
        return compiled

    def call(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*args, *before.run(*(args[i] for i in before.sources)))

    return call


def _is_small(node: Node) -> bool:
    value = node.meta.get("val")
    if node.op not in ("placeholder", "call_function") or _draws(node):
        return False
    return node.op == "placeholder" or not isinstance(value, torch.Tensor) or elements(value) <= _FEW


def _draws(node: Node) -> bool:
    """Whether a node may yield something else when it is moved, or computed once instead of twice."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or (
        node.op == "call_function" and node.is_impure()
    )
