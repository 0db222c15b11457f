"""What is the same for every head is computed once, and expanded after: ``f(expand(x))`` becomes ``expand(f(x))``.

A rotary key that is expanded to all heads first and turned then has heads on the way, as a key of its own for each head
would have. Pointwise ops, and those that move values along other axes, commute with an expansion, so it is moved down
to where keys are put together; the rotary key is then a latent, however early it was expanded.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch.fx import Graph, Node

from mlacompile.passes.axes import Size, shape_of, size_of
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten
_SAME = {aten.clone.default, aten.alias.default}
_RESHAPE = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_JOINS = {aten.cat.default, aten.stack.default}
_NO = "has another size"
_SPLIT = {aten.split_with_sizes.default, aten.split.Tensor}


@dataclass(frozen=True)
class _Shared:
    """A node is ``small`` with dimension ``dim``, of size one, expanded. computed: more than views lie between it and
    what the model expanded."""

    small: Node
    dim: int
    computed: bool


def share_heads(graph: Graph, roots: Iterable[Node]) -> None:
    """Move expansions down, in everything that some keys and values are made of."""
    wanted: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack += node.all_input_nodes
    known: dict[Node, _Shared] = {}
    for node in list(graph.nodes):
        if node in wanted and node.op == "call_function":
            found = _expansion(node) or _carried(node, known)
            if found is not None:
                known[node] = found
    for node, shared in known.items():
        rest = [user for user in node.users if user not in known]
        if shared.computed and rest:
            whole = _as_before(node, shared)
            for user in rest if whole is not None else ():
                user.replace_input_with(node, whole)  # type: ignore[arg-type]


def _expansion(node: Node) -> _Shared | None:
    """Where the model itself expands one static dimension of size one."""
    source: Any = node.args[0] if node.args else None
    if node.target is aten.cat.default:
        source = source[0] if len(set(source)) == 1 else None
    elif node.target not in (aten.expand.default, aten.repeat.default):
        return None
    small = shape_of(source) if isinstance(source, Node) else None
    large = shape_of(node)
    if small is None or large is None or len(small) != len(large):
        return None
    grown = [i for i, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if len(grown) != 1 or small[grown[0]] != 1 or not isinstance(large[grown[0]], int):
        return None
    return _Shared(source, grown[0], False)


def _carried(node: Node, known: dict[Node, _Shared]) -> _Shared | None:
    """The expansion of a node whose operands are expanded, with everything before it computed on the small ones."""
    if not any(a in known for a in node.all_input_nodes) and node.target is not operator.getitem:
        return None
    emit = Emitter(node)
    if node.target is operator.getitem:
        return _part(emit, node, known)
    first = known.get(node.args[0]) if isinstance(node.args[0], Node) else None
    shape = shape_of(node)
    if shape is None:
        return None
    if first is not None and node.target in _SAME:
        return first
    if first is not None and (moved := _moved(emit, node, first, shape)) is not None:
        return moved
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) and node.target is not aten.copy.default:
        return _pointwise(emit, node, list(node.args), known, shape)
    if node.target in _JOINS:
        return _pointwise(emit, node, list(node.args[0]), known, shape)  # type: ignore[arg-type]
    return None


def _moved(emit: Emitter, node: Node, shared: _Shared, shape: tuple[Size, ...]) -> _Shared | None:
    """Through an op that rearranges one tensor."""
    target, small, dim, rank = node.target, shared.small, shared.dim, len(shape)
    args: Any = node.args
    if target in _RESHAPE:
        before = shape_of(args[0])
        at = _same_place(before or (), dim, shape)
        if at is None:
            return None
        sizes = [1 if i == at else size for i, size in enumerate(args[1])]
        return _Shared(emit(aten.reshape.default, small, sizes), at, shared.computed)
    if target is aten.view_as_complex.default or target is aten.view_as_real.default:
        if target is aten.view_as_complex.default:
            small = emit(aten.clone.default, small, memory_format=torch.contiguous_format)
        return _Shared(emit(target, small), dim, shared.computed)
    if target is aten.permute.default:
        order = [d % rank for d in args[1]]
        return _Shared(emit(target, small, order), order.index(dim), shared.computed)
    if target is aten.transpose.int:
        i, j = (d % rank for d in args[1:3])
        swapped = j if dim == i else i if dim == j else dim
        return _Shared(emit(target, small, i, j), swapped, shared.computed)
    if target is aten.unsqueeze.default:
        new = args[1] % rank
        return _Shared(emit(target, small, new), dim + (new <= dim), shared.computed)
    if target is aten.slice.Tensor and (args[1] if len(args) > 1 else 0) % rank != dim:
        return _Shared(emit(target, small, *args[1:]), dim, shared.computed)
    return None


def _same_place(before: tuple[Size, ...], dim: int, after: tuple[Size, ...]) -> int | None:
    """Where a dimension is found again in another shape of the same elements."""

    def product(sizes: tuple[Size, ...]) -> Size:
        total: Size = 1
        for size in sizes:
            total = total * size
        return total

    ahead = product(before[:dim])
    for at, size in enumerate(after):
        if size == before[dim] and product(after[:at]) == ahead:
            return at
    return None


def _part(emit: Emitter, node: Node, known: dict[Node, _Shared]) -> _Shared | None:
    """A part of a split: the small tensor is split instead."""
    split: Any = node.args[0]
    shared = known.get(split.args[0]) if split.target in _SPLIT else None
    rank = len(shape_of(node) or (1,))
    if shared is None or (split.args[2] if len(split.args) > 2 else 0) % rank == shared.dim:
        return None
    parts = emit(split.target, shared.small, *split.args[1:])
    return _Shared(emit(operator.getitem, parts, node.args[1]), shared.dim, shared.computed)


def _pointwise(
    emit: Emitter, node: Node, operands: list[Any], known: dict[Node, _Shared], shape: tuple[Size, ...]
) -> _Shared | None:
    """Where every tensor is expanded along one and the same dimension, counted from the last, or has size one there."""
    for end in sorted({len(shape_of(a) or ()) - known[a].dim for a in operands if isinstance(a, Node) and a in known}):
        small = [_small(a, end, known) for a in operands]
        if _NO in small:
            continue
        dim = len(shape) - end
        if node.target not in _JOINS:
            return _Shared(emit(node.target, *small, **node.kwargs), dim, True)
        axis: Any = node.args[1] if len(node.args) > 1 else 0
        along = axis % len(shape)
        if node.target is aten.stack.default:  # one dimension more, behind or before the expanded one
            dim = len(shape) - 1 - end + (along <= len(shape) - 1 - end)
        if along != dim and len({len(shape_of(a) or ()) for a in operands}) == 1:
            return _Shared(emit(node.target, small, along), dim, True)
    return None


def _small(operand: Any, end: int, known: dict[Node, _Shared]) -> Any:
    """An operand with size one in a dimension counted from the last; ``_NO`` where it has another."""
    size = shape_of(operand) if isinstance(operand, Node) else None
    if size is None:
        return operand
    if operand in known and len(size) - known[operand].dim == end:
        return known[operand].small
    return operand if len(size) < end or size[-end] == 1 else _NO


def _as_before(node: Node, shared: _Shared) -> Node | None:
    """The node's value, lying in memory as it was traced: what follows may view it."""
    shape = shape_of(node)
    assert shape is not None
    order = _memory_order(node, shape)
    if order is None:
        return None
    emit = Emitter(node)
    whole = emit(aten.expand.default, shared.small, [shape[i] if i == shared.dim else -1 for i in range(len(shape))])
    whole = emit.permute(whole, order)
    whole = emit(aten.clone.default, whole, memory_format=torch.contiguous_format)
    return emit.permute(whole, [order.index(i) for i in range(len(order))])


def _memory_order(node: Node, shape: tuple[Size, ...]) -> list[int] | None:
    """Dimensions from the outermost to the innermost in memory, where they fill it; no question is asked of symbols."""
    strides = [size_of(s) for s in node.meta["val"].stride()]
    for order in permutations(range(len(shape))):
        want: Size = 1
        for i in reversed(order):
            if shape[i] != 1 and strides[i] != want:
                break
            want = want * shape[i]
        else:
            return list(order)
    return None
