"""A few ops between two values of a graph: which, and what they compute, found by running them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

import mlacompile.ops.cache_slots
import mlacompile.ops.stored  # noqa: F401  (both register an op)
from mlacompile.passes.pull import RESHAPES

aten = torch.ops.aten

#: Ops that give elements other places, or leave some out, and change none.
MOVES = RESHAPES | {
    *(aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default),
    *(aten.permute.default, aten.transpose.int, aten.expand.default, aten.slice.Tensor, aten.select.int),
    *(aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int, operator.getitem),
}
#: Ops after which elements are in the same order in another shape.
SAME_ORDER = RESHAPES | {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default}
_CAST = aten._to_copy.default
#: Where values come from that a step computes, which no table of positions does.
_ORIGINS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.embedding.default}
_TABLES = {torch.ops.mlacompile.cache_slots.default, torch.ops.mlacompile.stored.default}


def squeezed(node: Node) -> tuple[int, ...] | None:
    """A static shape without its dimensions of one; None for what has none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
        return None
    return tuple(int(size) for size in value.shape if size != 1)


def same_values(node: Node) -> Node:
    """Past ops that keep elements and their order, and dimensions but for those of one."""
    while node.op == "call_function" and node.target in SAME_ORDER:
        source: Any = node.args[0]
        if squeezed(source) is None or squeezed(source) != squeezed(node):
            break
        node = source
    return node


def fed_by_tokens(graph: torch.fx.Graph) -> set[Node]:
    """All nodes whose values depend on more than positions: on what products or an embedding made of a token."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target in _TABLES:
            continue
        ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "mlacompile"
        if ours or node.target in _ORIGINS or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def is_float_cast(node: Node) -> bool:
    """Whether a node is a value in another floating point dtype of 16 bits or more."""
    if node.op != "call_function" or node.target is not _CAST:
        return False
    dtypes = [n.meta["val"].dtype for n in (node, node.args[0])]  # type: ignore[union-attr]
    return all(d.is_floating_point and d.itemsize > 1 for d in dtypes)


def replay(node: Node, env: dict[Node, Any], call: Callable[..., Any], *, casts: bool) -> Any:
    """Run the ops between the nodes in ``env`` and ``node``, adding each to ``env``.

    Args:
        env: values of nodes, tensors or whatever ``call(op, *args, **kwargs)`` takes and returns.
        casts: keep changes of floating point dtypes; else everything has that of what ``env`` begins with.
    Raises:
        KeyError: an input of the graph is needed that is not in ``env``.
    """
    if node not in env:
        if node.op != "call_function":
            raise KeyError(node)
        for source in node.all_input_nodes:
            replay(source, env, call, casts=casts)
        if not casts and is_float_cast(node):
            env[node] = env[node.args[0]]  # type: ignore[index]
        else:
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = call(node.target, *args, **kwargs)
    return env[node]


def run(node: Node, feeds: Mapping[Node, Tensor], *, casts: bool) -> Tensor:
    """The value of a node where others have these; see ``replay``."""
    return replay(node, dict(feeds), lambda op, *args, **kwargs: op(*args, **kwargs), casts=casts)  # type: ignore[no-any-return]


def random_like(node: Node, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
    """Normal noise in the shape of a node, contiguous, on the CPU; in float64, complex where the node is, or in
    ``dtype``."""
    value = node.meta["val"]
    wide = torch.complex128 if value.is_complex() else torch.float64
    return torch.randn(value.shape, generator=generator, dtype=wide).to(dtype or wide)
