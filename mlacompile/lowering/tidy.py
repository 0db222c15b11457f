"""What is left over where two pieces of a model meet, and what is written as more than it is.

    slice(cat([a, b]), where b lies)            →  b
    clone(x), contiguous, of a contiguous x     →  x
    clone(permute(clone(x)))                    →  clone(permute(x))
    bmm(a [B, M, 1], b [B, 1, N])               →  a · b, elementwise: rotary angles are such an outer product
    cat([x[..., :n], y]), y as long as the rest  →  as_strided_scatter(x, y), which is done where x lies

Inductor would run a kernel for each of the first three wherever an op that it does not fuse reads or writes there, a
library's matrix product for the fourth, and a pass over memory of its own for the last: so queries keep most of what
they are while a few of their columns are rotated.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mlacompile.lowering.stretches import stretch_of
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten


def tidy(gm: GraphModule) -> int:
    """Take such moves out of a functional graph, and make such products elementwise; returns how many."""
    taken = 0
    returned = set(gm.graph.output_node().all_input_nodes)
    for node in gm.graph.find_nodes(op="call_function", target=aten.clone.default):
        taken += _copied_twice(node)
    for node in gm.graph.nodes:
        same = _same(node)
        if same is not None and node not in returned:
            node.replace_all_uses_with(same)
            taken += 1
    for node in gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
        if node.args[0].meta["val"].shape[2] == 1:
            node.replace_all_uses_with(Emitter(node)(aten.mul.Tensor, *node.args))
            taken += 1
    for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default):
        taken += _scattered(node)
    if taken:  # strides may be others now, and what was a view of the one may need a copy of the other
        for node in gm.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default
    return taken


def _same(node: Node) -> Node | None:
    """An earlier node with the same value, shape and, as far as it is promised, layout."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return None
    if node.target is aten.slice.Tensor:
        return _part(node)
    if node.target is not aten.clone.default or node.kwargs.get("memory_format") is not torch.contiguous_format:
        return None
    source: Any = node.args[0]
    fixed = not any(isinstance(s, torch.SymInt) for s in source.meta["val"].shape)
    return source if source.op == "call_function" and fixed and source.meta["val"].is_contiguous() else None


def _copied_twice(node: Node) -> bool:
    """Let a copy read what another copy was made of, if only axes changed places in between."""
    source: Any = node.args[0]
    moves: list[Node] = []
    while source.target in (aten.permute.default, aten.transpose.int):
        moves.append(source)
        source = source.args[0]
    if not moves or source.target is not aten.clone.default or node.kwargs.get("memory_format") is None:
        return False
    emit, now = Emitter(node), source.args[0]
    for move in reversed(moves):
        now = emit(move.target, now, *move.args[1:])
    node.replace_input_with(moves[0], now)
    return True


def _part(node: Node) -> Node | None:
    """The operand of a concatenation that a slice of it is."""
    joined: Any = node.args[0]
    if joined.op != "call_function" or joined.target is not aten.cat.default:
        return None
    given: tuple[Any, ...] = node.args[1:]
    dim, start, end, step = given + (0, None, None, 1)[len(given) :]
    rank = joined.meta["val"].dim()
    along = (joined.args[1] if len(joined.args) > 1 else 0) % rank
    if dim % rank != along or step != 1:
        return None
    total, at = joined.meta["val"].shape[along], 0
    start, end = start or 0, total if end is None else end
    for part in joined.args[0]:
        size = part.meta["val"].shape[along]
        if not all(isinstance(s, int) for s in (size, start, end, total)) or part.meta["val"].dim() != rank:
            return None
        if (at, at + size) == (start, min(end, total)):
            return part  # type: ignore[no-any-return]
        at += size
    return None


def _scattered(joined: Node) -> bool:
    """Write into a value what a concatenation of most of it with something else says.

    By strides into what an op made, and not along a dimension of the view: that alone Inductor always does in place.
    """
    parts: Any = joined.args[0]
    value = joined.meta["val"]
    dim = _dimension(joined.args[1:], value.dim())
    if any(part.meta["val"].dim() != value.dim() for part in parts):
        return False  # torch lets an empty vector be joined with anything
    sizes = [part.meta["val"].shape[dim] for part in parts]
    if len(sizes) != 2 or not all(isinstance(size, int) for size in value.shape):
        return False
    most = int(sizes[1] > sizes[0])
    kept, new = parts[most], parts[1 - most]
    emit = Emitter(joined)
    whole = _whole(emit, kept, dim)
    if whole is None:
        return False
    source, start = whole
    alike = source.meta["val"].shape == value.shape and source.meta["val"].dtype == new.meta["val"].dtype == value.dtype
    if not alike or start != most * sizes[0]:
        return False
    made, views = _made(source)
    laid = _laid(made, views)
    if laid is None:
        return False
    into = laid.narrow(dim, sizes[0] * (1 - most), sizes[1 - most])
    out = emit(aten.as_strided_scatter.default, made, new, list(into.shape), list(into.stride()), into.storage_offset())
    for view in views:
        out = emit(view.target, out, *view.args[1:])
    joined.replace_all_uses_with(out)
    return True


def _dimension(given: Sequence[Any], rank: int) -> int:
    """The dimension that an op was given first of its further arguments; 0 if none was."""
    return int(given[0] if given else 0) % rank


def _whole(emit: Emitter, part: Any, dim: int) -> tuple[Node, int] | None:
    """What a value is a stretch of along a dimension, and where that begins; None: it is whole."""
    rank = part.meta["val"].dim()
    if part.target in (aten.permute.default, aten.transpose.int):
        order = list(range(rank))
        if part.target is aten.permute.default:
            order = [d % rank for d in part.args[1]]
        else:
            a, b = (d % rank for d in part.args[1:])
            order[a], order[b] = b, a
        inner = _whole(emit, part.args[0], order[dim])
        return None if inner is None else (emit(part.target, inner[0], *part.args[1:]), inner[1])
    stretch = stretch_of(part)
    return None if stretch is None or stretch[1] != dim else (stretch[0], stretch[2])


#: Through which a value is still the memory that an op wrote.
_VIEWS = {
    aten.permute.default,
    aten.transpose.int,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
}


def _made(node: Node) -> tuple[Node, list[Node]]:
    """What is not a view itself, and the views of it that lead to a node, in order."""
    views: list[Node] = []
    while node.target in _VIEWS:
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, views[::-1]


def _laid(made: Node, views: list[Node]) -> Tensor | None:
    """How views lie in the memory of what an op of the graph wrote, without data; None if it may not be written, or a
    view is none."""
    value = made.meta["val"]
    if not _has_memory(made) or not isinstance(value, Tensor) or not value.is_contiguous():
        return None
    laid = torch.empty(value.shape, device="meta")
    for view in views:
        moves = view.target in (aten.permute.default, aten.transpose.int)
        try:
            laid = view.target(laid, *view.args[1:]) if moves else laid.view(view.meta["val"].shape)  # type: ignore[operator]
        except RuntimeError:  # a reshape that copies
            return None
    return laid


def _has_memory(node: Node) -> bool:
    """Whether an op of the graph made a value, and not a view: strides count from where memory begins, which a part of
    something larger need not."""
    op: Any = node.args[0].target if node.target is operator.getitem else node.target  # type: ignore[union-attr]
    schema = getattr(op, "_schema", None)
    return schema is not None and all(value.alias_info is None for value in schema.returns)
