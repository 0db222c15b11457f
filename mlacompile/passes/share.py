"""What is the same for every head is computed once, and expanded after: ``f(expand(x))`` becomes ``expand(f(x))``.

A rotary key that is expanded to all heads first and turned then has heads on the way, as a key of its own for each head
would have. Pointwise ops and those that move values along other axes commute with an expansion, so it is moved down to
where keys are put together; the rotary key is then a latent, however early it was expanded.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from mlacompile.passes.axes import shape_of, size_of
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten
_ALONG = {  # ops that act along one axis, and where their arguments say which
    aten.slice.Tensor: (1, 0),
    aten.cat.default: (1, 0),
}
_VIEWS = {aten.slice.Tensor}
_COPIES = {aten.clone.default, aten.copy.default}


def share_heads(graph: Graph, roots: Iterable[Node]) -> None:
    """Move expansions down, in everything that some keys and values are made of."""
    wanted: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack += node.all_input_nodes
    for node in list(graph.nodes):
        if node in wanted and node.op == "call_function":
            moved = _below(node)
            if moved is not None:
                node.replace_all_uses_with(moved)


def _expanded(node: Any) -> tuple[Node, int] | None:
    """(x, dimension) where a node is x with one static dimension of one expanded, and nothing else."""
    if isinstance(node, Node) and node.target is aten.clone.default:
        node = node.args[0]
    if not isinstance(node, Node) or node.target not in (aten.expand.default, aten.repeat.default):
        return None
    source: Node = node.args[0]  # type: ignore[assignment]
    small, large = shape_of(source), shape_of(node)
    if small is None or large is None or len(small) != len(large):
        return None
    grown = [i for i, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    return (source, grown[0]) if len(grown) == 1 and small[grown[0]] == 1 and isinstance(large[grown[0]], int) else None


def _below(node: Node) -> Node | None:
    """``expand(f(x))`` for a node that is ``f(expand(x))``; None where they do not commute."""
    shape = shape_of(node)
    if node.target is operator.getitem:
        return _part(node, shape)
    if shape is None:
        return None
    found = {i: _expanded(a) for i, a in enumerate(_operands(node))}
    dims = {len(shape_of(e[0]) or ()) - e[1] for e in found.values() if e is not None}
    if len(dims) != 1 or not _commutes(node, found, dims.pop(), shape):
        return None
    emit = Emitter(node)
    small = emit(node.target, *_replaced(node, found), **node.kwargs)
    moved = emit(aten.expand.default, small, [emit.size(node, i) for i in range(len(shape))])
    # What follows was traced on a result of its own, and may view it.
    return moved if node.target in _VIEWS else emit(aten.clone.default, moved, memory_format=torch.contiguous_format)


def _dense(node: Node, shape: tuple[Any, ...]) -> bool:
    """Whether a result lies in memory row by row, as far as its strides say without a question to the shapes."""
    want: Any = 1
    for size, stride in zip(reversed(shape), reversed(node.meta["val"].stride()), strict=True):
        if size != 1 and size_of(stride) != want:
            return False
        want = want * size
    return True


def _operands(node: Node) -> list[Any]:
    first = node.args[0]
    return list(first) if node.target is aten.cat.default else list(node.args)  # type: ignore[arg-type]


def _replaced(node: Node, found: dict[int, Any]) -> list[Any]:
    operands = [found[i][0] if found.get(i) else a for i, a in enumerate(_operands(node))]
    return [operands, *node.args[1:]] if node.target is aten.cat.default else operands


def _commutes(node: Node, found: dict[int, Any], from_end: int, shape: tuple[Any, ...]) -> bool:
    """Whether every operand is expanded along this dimension (counted from the last), or has size one there, and the op
    leaves it alone."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if node.target in _COPIES or not (pointwise or node.target in _ALONG):
        return False
    if node.target not in _VIEWS and not _dense(node, shape):
        return False
    if node.target in _ALONG:
        at, default = _ALONG[node.target]
        dim = node.args[at] if len(node.args) > at else default
        rank = len(shape_of(_operands(node)[0]) or ())
        if not isinstance(dim, int) or dim % rank == rank - from_end:
            return False
    for i, operand in enumerate(_operands(node)):
        size = shape_of(operand) if isinstance(operand, Node) else None
        if found[i] is None and size is not None and len(size) >= from_end and size[-from_end] != 1:
            return False
    return len(shape) >= from_end


def _part(node: Node, shape: tuple[Any, ...] | None) -> Node | None:
    """A part of a split of an expanded value: the split is made before."""
    split: Any = node.args[0]
    if split.target not in (aten.split_with_sizes.default, aten.split.Tensor) or shape is None:
        return None
    found = _expanded(split.args[0])
    if found is None:
        return None
    dim = split.args[2] if len(split.args) > 2 else 0
    if dim % len(shape) == found[1]:
        return None
    emit = Emitter(node)
    small = emit(operator.getitem, emit(split.target, found[0], *split.args[1:]), node.args[1])
    return emit(aten.expand.default, small, [emit.size(node, i) for i in range(len(shape))])
