"""Follow the axes of a tensor backwards through a graph.

Attention says what the axes of K are: batch, head, token, feature. Walking back from it, every structural or linear op
says which axes its inputs must have had. So the walk knows where a value stops having heads: that value is a latent,
whatever the model calls it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch.fx import Node

from mlacompile.passes.axes import (
    FEATURE,
    HEAD,
    Atom,
    Dim,
    Dims,
    Pulled,
    Size,
    broadcast_dims,
    labels,
    regroup,
    shape_of,
    shape_with,
    whole_quotient,
)

aten = torch.ops.aten

_fresh = count()


def _blocked(dim: Dim) -> bool:
    """A dimension an op may not cut or join: batch or tokens run along it."""
    return any(a.resizable for a in dim)


def _resized(dim: Dim, size: Size) -> Dim:
    """The dimension with another size; it still counts as bearing heads when it did."""
    label = HEAD if any(a.label == HEAD for a in dim) else FEATURE
    return () if size == 1 else (Atom(label, size),)


def _axis(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _same(node: Node, dims: Dims) -> Pulled | None:
    return [(node.args[0], dims)]  # type: ignore[list-item]


def _cast(node: Node, dims: Dims) -> Pulled | None:
    """Rounding to another floating point width counts as linear; to integers or eight bits it is a quantizer."""
    val = node.meta["val"]
    return _same(node, dims) if val.is_floating_point() and val.dtype.itemsize > 1 else None


def _elementwise(node: Node, dims: Dims) -> Pulled | None:
    pulled: Pulled = []
    for arg in node.args[:2]:
        if isinstance(arg, Node) and shape_of(arg) is not None:
            operand = broadcast_dims(arg, dims)
            if operand is None:
                return None
            pulled.append((arg, operand))
    return pulled or None


def _copy(node: Node, dims: Dims) -> Pulled | None:
    source = node.args[1]
    operand = broadcast_dims(source, dims) if isinstance(source, Node) else None
    return None if operand is None else [(source, operand)]  # type: ignore[list-item]


def _view(node: Node, dims: Dims) -> Pulled | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    shape = shape_of(source)
    grouped = None if shape is None else regroup([a for d in dims for a in d], shape)
    return None if grouped is None else [(source, grouped)]


def _expand(node: Node, dims: Dims) -> Pulled | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    operand = broadcast_dims(source, dims)
    return None if operand is None else [(source, operand)]


def _permute(node: Node, dims: Dims) -> Pulled | None:
    rank = len(dims)
    if node.target is aten.t.default:
        order = list(range(rank))[::-1]
    elif node.target is aten.transpose.int:
        i, j = (_axis(d, rank) for d in node.args[1:3])  # type: ignore[arg-type]
        order = list(range(rank))
        order[i], order[j] = order[j], order[i]
    else:
        order = [_axis(d, rank) for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    source = [()] * rank  # type: list[Dim]
    for out, inp in enumerate(order):
        source[inp] = dims[out]
    return [(node.args[0], tuple(source))]  # type: ignore[list-item]


def _unsqueeze(node: Node, dims: Dims) -> Pulled | None:
    at = _axis(node.args[1], len(dims))  # type: ignore[arg-type]
    rest = list(dims[:at] + dims[at + 1 :])
    if dims[at] and rest:  # an axis of one moves to a neighbour
        near = min(at, len(rest) - 1)
        rest[near] = dims[at] + rest[near] if near == at else rest[near] + dims[at]
    return [(node.args[0], tuple(rest))]  # type: ignore[list-item]


def _squeeze(node: Node, dims: Dims) -> Pulled | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    shape = shape_of(source)
    if shape is None:
        return None
    if len(node.args) == 1:
        dropped = {i for i, s in enumerate(shape) if s == 1}
    else:
        at = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        dropped = {_axis(d, len(shape)) for d in at}  # type: ignore[arg-type]
        dropped = {d for d in dropped if shape[d] == 1}
    kept = iter(dims)
    return [(source, tuple(() if i in dropped else next(kept) for i in range(len(shape))))]


def _narrowed(source: Node, dims: Dims, at: int) -> Pulled | None:
    """Pull back through an op that keeps a part of dimension ``at`` of its source."""
    shape = shape_of(source)
    if shape is None:
        return None
    if shape[at] == shape_with(dims)[at]:
        return [(source, dims)]
    if _blocked(dims[at]) or not isinstance(shape[at], int):
        return None
    return [(source, dims[:at] + (_resized(dims[at], shape[at]),) + dims[at + 1 :])]


def _slice(node: Node, dims: Dims) -> Pulled | None:
    at = _axis(node.args[1] if len(node.args) > 1 else 0, len(dims))  # type: ignore[arg-type]
    return _narrowed(node.args[0], dims, at)  # type: ignore[arg-type]


def _getitem(node: Node, dims: Dims) -> Pulled | None:
    split: Node = node.args[0]  # type: ignore[assignment]
    if split.target in (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default):
        at = _axis(split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0), len(dims))  # type: ignore[arg-type]
        return _narrowed(split.args[0], dims, at)  # type: ignore[arg-type]
    if split.target is aten.unbind.int:
        source: Node = split.args[0]  # type: ignore[assignment]
        return _inserted(source, dims, split.args[1] if len(split.args) > 1 else 0)  # type: ignore[arg-type]
    return None


def _select(node: Node, dims: Dims) -> Pulled | None:
    return _inserted(node.args[0], dims, node.args[1])  # type: ignore[arg-type]


def _inserted(source: Node, dims: Dims, dim: int) -> Pulled | None:
    shape = shape_of(source)
    if shape is None:
        return None
    at = _axis(dim, len(shape))
    if not isinstance(shape[at], int):
        return None
    extra: Dim = () if shape[at] == 1 else (Atom(FEATURE, shape[at]),)
    return [(source, dims[:at] + (extra,) + dims[at:])]


def _cat(node: Node, dims: Dims) -> Pulled | None:
    at = _axis(node.args[1] if len(node.args) > 1 else 0, len(dims))  # type: ignore[arg-type]
    if _blocked(dims[at]):
        return None
    pulled: Pulled = []
    for source in node.args[0]:  # type: ignore[union-attr]
        shape = shape_of(source)  # type: ignore[arg-type]
        if shape is None or len(shape) != len(dims) or not isinstance(shape[at], int):
            return None
        pulled.append((source, dims[:at] + (_resized(dims[at], shape[at]),) + dims[at + 1 :]))  # type: ignore[arg-type]
    return pulled


def _stack(node: Node, dims: Dims) -> Pulled | None:
    at = _axis(node.args[1] if len(node.args) > 1 else 0, len(dims))  # type: ignore[arg-type]
    if labels((dims[at],)) - {FEATURE, HEAD}:
        return None
    return [(source, dims[:at] + dims[at + 1 :]) for source in node.args[0]]  # type: ignore[union-attr,misc]


def _scatter(node: Node, dims: Dims) -> Pulled | None:
    base, source = node.args[0], node.args[1]
    shape = shape_of(source)  # type: ignore[arg-type]
    if node.target is aten.select_scatter.default:
        at = _axis(node.args[2], len(dims))  # type: ignore[arg-type]
        inner = dims[:at] + dims[at + 1 :]
        return None if labels((dims[at],)) - {FEATURE} else [(base, dims), (source, inner)]  # type: ignore[list-item]
    at = _axis(node.args[2] if len(node.args) > 2 else 0, len(dims))  # type: ignore[arg-type]
    if shape is None:
        return None
    if shape[at] == shape_with(dims)[at]:
        return [(source, dims)]  # type: ignore[list-item]
    if _blocked(dims[at]) or not isinstance(shape[at], int):
        return None
    inner = dims[:at] + (_resized(dims[at], shape[at]),) + dims[at + 1 :]
    return [(base, dims), (source, inner)]  # type: ignore[list-item]


def _pad(node: Node, dims: Dims) -> Pulled | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    shape, pads = shape_of(source), list(node.args[1])  # type: ignore[arg-type]
    if shape is None:
        return None
    out = list(dims)
    for i in range(len(pads) // 2):
        at = len(dims) - 1 - i
        if pads[2 * i] == pads[2 * i + 1] == 0:
            continue
        if _blocked(dims[at]) or not isinstance(shape[at], int):
            return None
        out[at] = _resized(dims[at], shape[at])
    return [(source, tuple(out))]


def _repeat(node: Node, dims: Dims) -> Pulled | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    shape = shape_of(source)
    if shape is None:
        return None
    extra = len(dims) - len(shape)
    out: list[Dim] = []
    for dim, size in zip(dims[extra:], shape, strict=True):
        times = whole_quotient(shape_with((dim,))[0], size)
        grouped = None if times is None else regroup(dim, (times, size))
        if grouped is None:
            return None
        out.append(grouped[1])
    return [(source, tuple(out))]


def _contraction(size: Size) -> Dim:
    return () if size == 1 else (Atom(f"k{next(_fresh)}", size),)


def _mm(node: Node, dims: Dims) -> Pulled | None:
    bias, (x, y) = (node.args[0], node.args[1:3]) if node.target is aten.addmm.default else (None, node.args[:2])
    shape = shape_of(x)  # type: ignore[arg-type]
    if shape is None:
        return None
    k = _contraction(shape[-1])
    pulled: Pulled = [(x, dims[:-1] + (k,)), (y, dims[:-2] + (k, dims[-1]))]  # type: ignore[list-item]
    if isinstance(bias, Node):
        operand = broadcast_dims(bias, dims)
        if operand is None:
            return None
        pulled.append((bias, operand))
    return pulled


def _sum(node: Node, dims: Dims) -> Pulled | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    shape = shape_of(source)
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    if shape is None or not node.args[1]:
        return None
    summed = {_axis(d, len(shape)) for d in node.args[1]}  # type: ignore[union-attr,arg-type]
    kept = iter(dims)
    out: list[Dim] = []
    for i, size in enumerate(shape):
        if i in summed:
            out.append(_contraction(size))
            if keep:
                next(kept)
        else:
            out.append(next(kept))
    return [(source, tuple(out))]


#: Ops that only rearrange, and keep every element: a latent may be followed back through them.
REARRANGE: dict[Any, Callable[[Node, Dims], Pulled | None]] = {
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.contiguous.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.transpose.int: _permute,
    aten.permute.default: _permute,
    aten.t.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
}

#: Those that keep the order of elements too.
RESHAPES = frozenset(op for op, rule in REARRANGE.items() if rule in (_view, _unsqueeze, _squeeze))

#: All ops that act on every (batch, token) pair alike and linearly in each operand.
LINEAR: dict[Any, Callable[[Node, Dims], Pulled | None]] = REARRANGE | {
    aten._to_copy.default: _cast,
    aten.neg.default: _same,
    aten.copy.default: _copy,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice_scatter.default: _scatter,
    aten.select_scatter.default: _scatter,
    aten.constant_pad_nd.default: _pad,
    aten.repeat.default: _repeat,
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _mm,
    aten.sum.dim_IntList: _sum,
    aten.mul.Tensor: _elementwise,
    aten.mul.Scalar: _same,
    aten.div.Tensor: _elementwise,
    aten.div.Scalar: _same,
    aten.add.Tensor: _elementwise,
    aten.sub.Tensor: _elementwise,
}


def pull(node: Node, dims: Dims, table: dict[Any, Any] = LINEAR) -> Pulled | None:
    """The tensor inputs of a node and the dims they must have for its output to have ``dims``; None where the walk
    ends."""
    rule = table.get(node.target) if node.op == "call_function" else None
    return None if rule is None else rule(node, dims)


def upstream(node: Node, dims: Dims) -> Iterator[tuple[Node, Dims]]:
    """What a tensor is made of, as far as axes can be followed: linear ops, and whatever keeps the shape."""
    stack, seen = [(node, dims)], {node}
    while stack:
        here, axes = stack.pop()
        yield here, axes
        pulled = pull(here, axes)
        if pulled is None and here.op == "call_function":
            pulled = [(n, axes) for n in here.all_input_nodes if shape_of(n) == shape_of(here)]
        for source, source_axes in pulled or ():
            if source not in seen:
                seen.add(source)
                stack.append((source, source_axes))
