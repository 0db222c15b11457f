"""Attention written one head after the other becomes one attention op over all of them.

    for h in heads: out[h] = attention(q[h], k[h], v[h])      →      out = attention(cat(q), cat(k), cat(v))

Only ops of one head that do not depend on each other and have equal shapes, masks and scales are joined. Parts of the
keys that are the same for all, such as a rotary key, are expanded instead of repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

from mlacompile.passes.axes import shape_of
from mlacompile.passes.canonicalize import JOINED, attention_nodes
from mlacompile.passes.emit import Emitter
from mlacompile.passes.pull import REARRANGE, RESHAPES

aten = torch.ops.aten
_HEADS = 1
_RESHAPES = RESHAPES | {aten.clone.default}
_PLAIN = {
    *REARRANGE,
    aten.expand.default,
    aten.logical_not.default,
    aten._to_copy.default,
    aten.mul.Tensor,
    aten.sym_size.int,
}


@dataclass
class _Group:
    """Attention ops of one head that can run side by side, and everything that depends on them."""

    members: list[Node]
    after: set[Node] = field(default_factory=set)

    def takes(self, node: Node) -> bool:
        """Whether another op is like the members and depends on none of them."""
        one = self.members[0]
        shapes = [[shape_of(a) for a in n.args[:3]] for n in (one, node)]  # type: ignore[arg-type]
        rest = all(_same(a, b) for a, b in zip(one.args[3:], node.args[3:], strict=True))
        return shapes[0] == shapes[1] and rest and node not in self.after

    def add(self, node: Node) -> None:
        """Take another op in."""
        self.members.append(node)
        stack = [node]
        while stack:
            for user in stack.pop().users:
                if user not in self.after:
                    self.after.add(user)
                    stack.append(user)


def join_heads(graph: Graph) -> None:
    """Join the single heads of a graph, in place."""
    joined = [g.members for g in _groups(graph) if len(g.members) > 1]
    for members in joined:
        _join(members)
    if joined:
        stable_topological_sort(graph)


def _groups(graph: Graph) -> Iterator[_Group]:
    open_groups: list[_Group] = []
    for node in attention_nodes(graph):
        shape = shape_of(node)
        if shape is None or len(shape) != 4 or shape[_HEADS] != 1 or node.kwargs:
            continue
        group = next((g for g in open_groups if g.takes(node)), None)
        if group is None:
            open_groups.append(group := _Group([]))
        group.add(node)
    yield from open_groups


def _join(members: list[Node]) -> None:
    last = members[-1]
    emit = Emitter(last)
    operands = [_side_by_side(emit, [n.args[i] for n in members]) for i in range(3)]  # type: ignore[misc]
    attention = emit(torch.ops.mlacompile.attention.default, *operands, *last.args[3:])
    outputs = []
    for i, node in enumerate(members):
        own = emit(aten.slice.Tensor, attention, _HEADS, i, i + 1)
        own = emit(aten.clone.default, own, memory_format=torch.contiguous_format)
        outputs.append((own, node.args, dict(node.meta)))
    for node, (own, _, _) in zip(members, outputs, strict=True):
        node.replace_all_uses_with(own)
        node.graph.erase_node(node)
    attention.meta[JOINED] = outputs


def _side_by_side(emit: Emitter, nodes: list[Node]) -> Node:
    """Tensors ``[B, 1, S, D]`` of several heads as one ``[B, H, S, D]``."""
    if all(_same(nodes[0], n) for n in nodes):
        return emit(aten.expand.default, nodes[0], [-1, len(nodes), -1, -1])
    parts = [_parts(emit, n) for n in nodes]
    if any(len(p) != len(parts[0]) or len(p) < 2 for p in parts):
        return emit(aten.cat.default, nodes, _HEADS)
    return emit(aten.cat.default, [_side_by_side(emit, list(p)) for p in zip(*parts, strict=True)], -1)


def _parts(emit: Emitter, node: Node) -> Sequence[Node]:
    """What lies side by side in the features of a tensor, each with its dimensions."""
    source: Any = node
    while source.target in _RESHAPES and _without_ones(source) == _without_ones(source.args[0]):
        source = source.args[0]
    shape = shape_of(source)
    if source.target is not aten.cat.default or shape is None:
        return [node]
    if (source.args[1] if len(source.args) > 1 else 0) % len(shape) != len(shape) - 1:
        return [node]
    sizes = [emit.size(node, d) for d in range(3)]
    return [emit.view(part, [*sizes, int(part.meta["val"].shape[-1])]) for part in source.args[0]]


def _without_ones(node: Node) -> list[Any]:
    return [s for s in shape_of(node) or () if s != 1]


def _same(one: Any, other: Any, known: dict[tuple[Any, Any], bool] | None = None) -> bool:
    """Whether two values are computed alike from the same nodes."""
    known = {} if known is None else known
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b, known) for a, b in zip(one, other, strict=True))
    if not isinstance(one, Node) or not isinstance(other, Node):
        return type(one) is type(other) and bool(one == other)
    if one is other:
        return True
    if (one, other) not in known:
        alike = one.target == other.target and one.target in _PLAIN and one.kwargs == other.kwargs
        known[one, other] = alike and _same(one.args, other.args, known)
    return known[one, other]
