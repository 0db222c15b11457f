"""Integer tensors as linear functions of the token's and the query's index.

    arange(T)[None, None, None, :]                    →   t
    (arange(S) + position)[None, None, :, None]       →   s + position

Masks compare such tensors. What varies with neither index is a *term*: a node whose value is not looked at.
Anything that
varies with them in another way (a table, a product, a cumulative sum) has no such form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch.fx import Node

from mlacompile.passes.axes import shape_of, size_of

aten = torch.ops.aten

Labels: TypeAlias = tuple[str | None, ...]
INTEGERS = (torch.int32, torch.int64)  # a bound of another dtype rounds, or wraps when it is shifted
FAR = 2**30  # longer than any cache, and with a shift still an int32
_SHIFTS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor)
_TRAILING: Labels = ("B", "H", "S", "T")


@dataclass(frozen=True)
class Affine:
    """token·t + query·s + Σ factor·term + constant. terms: (node, factor) pairs; a node holds integers, or a
    SymInt."""

    token: int = 0
    query: int = 0
    terms: tuple[tuple[Node, int], ...] = ()
    constant: int = 0

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        """This and ``factor`` times the other."""
        terms = dict(self.terms)
        for node, times in other.terms:
            terms[node] = terms.get(node, 0) + factor * times
        return Affine(
            self.token + factor * other.token,
            self.query + factor * other.query,
            tuple((n, f) for n, f in terms.items() if f),
            self.constant + factor * other.constant,
        )

    def times(self, factor: int) -> Affine:
        """``factor`` times this."""
        return Affine().plus(self, factor)


def trailing(rank: int) -> Labels | None:
    """What the dimensions of a mask of that rank range over; None beyond [batch, heads, queries, tokens]."""
    return _TRAILING[4 - rank :] if rank <= 4 else None


def affine(value: Any, labels: Labels) -> Affine | None:
    """The form of an operand whose dimensions range over ``labels`` (its own are the last of them), or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Affine(constant=value) if abs(value) < FAR else None
    if not isinstance(value, Node):
        return None
    held = value.meta.get("val")
    if isinstance(held, torch.SymInt):
        return Affine(terms=((value, 1),))
    shape = shape_of(value)
    if shape is None or held.dtype not in INTEGERS or len(shape) > len(labels):  # type: ignore[union-attr]
        return None
    labels = labels[len(labels) - len(shape) :]
    if not any(size != 1 and label != "B" for size, label in zip(shape, labels, strict=True)):
        shifted = value.target in _SHIFTS and len(value.args) > 1 and isinstance(value.args[1], int)
        return (_sum(value, labels) if shifted else None) or Affine(terms=((value, 1),))
    rule = _RULES.get(value.target) if value.op == "call_function" else None
    return None if rule is None else rule(value, labels)


def inner_labels(node: Node, labels: Labels) -> Labels | None:
    """What the dimensions of a node's first argument range over, when the node only moves, adds or drops
    dimensions."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, Node):
        return None
    shape, inner = shape_of(node), shape_of(source)
    if shape is None or inner is None:
        return None
    rank, args = len(shape), cast("tuple[Any, ...]", node.args)
    if node.target in (aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh_copy.default):
        return labels
    if node.target is aten.expand.default:
        return labels[rank - len(inner) :]
    if node.target is aten.unsqueeze.default:
        at = args[1] % rank
        return labels[:at] + labels[at + 1 :]
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default) or _squeezes(node):
        return _without_ones(labels, shape, inner)
    order = _order(node, rank)
    if order is None:
        return None
    moved: list[str | None] = [None] * rank
    for out, source_dim in enumerate(order):
        moved[source_dim] = labels[out]
    return tuple(moved)


def _squeezes(node: Node) -> bool:
    return node.target in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def _without_ones(labels: Labels, shape: Sequence[Any], inner: Sequence[Any]) -> Labels | None:
    """Labels of ``inner`` when it differs from ``shape`` by dimensions of one alone."""
    kept = [(size, label) for size, label in zip(shape, labels, strict=True) if size != 1]
    if [size for size, _ in kept] != [size for size in inner if size != 1]:
        return None
    rest = iter(label for _, label in kept)
    return tuple(None if size == 1 else next(rest) for size in inner)


def _order(node: Node, rank: int) -> list[int] | None:
    args = cast("tuple[Any, ...]", node.args)
    if node.target is aten.permute.default:
        return [d % rank for d in args[1]]
    if node.target in (aten.transpose.int, aten.t.default):
        order = list(range(rank))
        i, j = (0, rank - 1) if node.target is aten.t.default else (d % rank for d in args[1:3])
        order[i], order[j] = order[j], order[i]
        return order
    return None


def _moved(node: Node, labels: Labels) -> Affine | None:
    inner = inner_labels(node, labels)
    return None if inner is None else affine(node.args[0], inner)


def _arange(node: Node, labels: Labels) -> Affine | None:
    args = cast("tuple[Any, ...]", node.args)
    start, step = (0, 1) if node.target is aten.arange.default else (args[0], args[2] if len(args) > 2 else 1)
    first = affine(start, ())
    if first is None or not isinstance(step, int):
        return None
    if labels[0] == "T":
        return first.plus(Affine(token=step))
    return first.plus(Affine(query=step)) if labels[0] == "S" else None


def _sum(node: Node, labels: Labels) -> Affine | None:
    factor = node.kwargs.get("alpha", 1)
    if not isinstance(factor, int):
        return None
    one, other = (affine(a, labels) for a in node.args[:2])
    if one is None or other is None:
        return None
    found = one.plus(other, -factor if node.target is aten.sub.Tensor else factor)
    # The sum is exact in 64 bits; in 32 a term near the end of its range would wrap before it is compared.
    wide = node.meta["val"].dtype is torch.int64 or not found.terms
    return found if wide and abs(found.constant) < FAR else None


def _rsub(node: Node, labels: Labels) -> Affine | None:
    one, other = (affine(a, labels) for a in node.args[:2])
    wide = node.meta["val"].dtype is torch.int64
    return None if one is None or other is None or not wide else other.plus(one, -1)


def _neg(node: Node, labels: Labels) -> Affine | None:
    inner = affine(node.args[0], labels)
    return inner.times(-1) if inner is not None and node.meta["val"].dtype is torch.int64 else None


def _cast(node: Node, labels: Labels) -> Affine | None:
    source = affine(node.args[0], labels)
    wide = node.meta["val"].dtype is torch.int64
    return source if source is not None and (wide or not source.terms) else None


def _slice(node: Node, labels: Labels) -> Affine | None:
    """``x[start:…]`` of something affine: the same, ``start`` further along that dimension."""
    args = cast("tuple[Any, ...]", node.args)
    dim, start = (*args[1:3], 0, 0)[:2]
    step = args[4] if len(args) > 4 else 1
    source = affine(args[0], labels)
    label = labels[dim % len(labels)]
    if source is None or step != 1 or not isinstance(start, int) or start < 0:
        return None
    along = source.token if label == "T" else source.query if label == "S" else 0
    return source.plus(Affine(constant=along * start))


_RULES: dict[Any, Callable[[Node, Labels], Affine | None]] = {
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor), _sum),
    **dict.fromkeys(
        (aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh_copy.default), _moved
    ),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _moved),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default), _moved),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default), _moved),
    aten.rsub.Scalar: _rsub,
    aten.neg.default: _neg,
    aten._to_copy.default: _cast,
    aten.slice.Tensor: _slice,
}


def static_value(form: Affine) -> Any:
    """The form without its indices as an int or a symbolic size, or None when it depends on data."""
    total: Any = form.constant
    for node, factor in form.terms:
        held = node.meta["val"]
        if not isinstance(held, torch.SymInt):
            return None
        total = total + factor * size_of(held)
    return total
