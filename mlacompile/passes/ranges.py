"""Masks that say no more than "tokens from here to there", where both ends may move on with the query.

    mask[b, 0, s, t] = (t <= s + position) & (t >= first[b]) & …        →   start[b] <= t < length[b], causal

A range is two integers a row where a mask is a byte a pair, and a kernel that knows it never touches what lies
outside.
Recognised are comparisons of the token's index with anything that does not depend on the token and depends on the
query by
at most its index, and triangles, joined by "and", under any broadcasting. Everything else stays a mask.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mlacompile.passes.affine import FAR, Affine, Labels, affine, inner_labels, static_value, trailing
from mlacompile.passes.axes import shape_of
from mlacompile.passes.emit import Emitter
from mlacompile.passes.known import known_band

aten = torch.ops.aten

_AND = {aten.logical_and.default, aten.bitwise_and.Tensor}
_NOT = {aten.logical_not.default, aten.bitwise_not.default}
_COMPARE = {
    aten.le.Tensor: "<=",
    aten.lt.Tensor: "<",
    aten.ge.Tensor: ">=",
    aten.gt.Tensor: ">",
    aten.le.Scalar: "<=",
    aten.lt.Scalar: "<",
    aten.ge.Scalar: ">=",
    aten.gt.Scalar: ">",
}
_SWAPPED = {"<=": ">=", "<": ">", ">=": "<=", ">": "<"}
_NEGATED = {"<=": ">", "<": ">=", ">=": "<", ">": "<="}
_ONES = {aten.ones.default, aten.new_ones.default, aten.ones_like.default}
_FILLED = {aten.full.default, aten.new_full.default, aten.full_like.default}


@dataclass(frozen=True)
class Bound:
    """One end of what a query sees: the first visible token (``upper`` False), or the first that is not (``upper``
    True).

    value: Σ terms + constant; with ``diagonal`` the query's index comes on top. source: the mask that says no more
    than
    this.
    """

    value: Affine
    upper: bool
    diagonal: bool
    source: Node


@dataclass(frozen=True)
class Conjunction:
    """A boolean mask taken apart: bounds, and the parts that are something else, all of which must hold."""

    bounds: tuple[Bound, ...] = ()
    rest: tuple[Node, ...] = ()


def conjunction(mask: Node, labels: Labels | None = None) -> Conjunction:
    """A boolean mask ``[…, S, T]`` as bounds and a rest. labels: what its dimensions range over, if not as usual."""
    labels = trailing(len(shape_of(mask) or ())) if labels is None else labels
    if labels is None:
        return Conjunction(rest=(mask,))
    bounds: list[Bound] = []
    rest: list[Node] = []
    for part, part_labels in _parts(mask, labels):
        bound = bound_of(part, part_labels, part, negated=False)
        known = None if isinstance(bound, Bound) or part_labels[-2:] != ("S", "T") else known_band(part)
        if isinstance(bound, Bound):
            bounds.append(bound)
        elif known is not None:
            ends = ((known.first, False), (known.end, True))
            bounds += [Bound(Affine(constant=at), upper, True, part) for at, upper in ends if at is not None]
        elif not _is_true(part):
            rest.append(part)
    return Conjunction(tuple(bounds), tuple(dict.fromkeys(rest)))


def _parts(mask: Node, labels: Labels) -> list[tuple[Node, Labels]]:
    """What is joined by "and", each with what its dimensions range over.

    A part is named by the innermost node that still has its dimensions in order, which can stand in for it in a mask.
    """
    if mask.target in _AND and all(isinstance(a, Node) for a in mask.args[:2]):
        found = []
        for arg in mask.args[:2]:
            rank = len(shape_of(arg) or ())  # type: ignore[arg-type]
            found += _parts(arg, labels[len(labels) - rank :])  # type: ignore[arg-type]
        return found
    inner = inner_labels(mask, labels)
    if inner is not None and _in_order(mask.args[0], inner, labels):  # type: ignore[arg-type]
        return _parts(mask.args[0], inner)  # type: ignore[arg-type]
    return [(mask, labels)]


def _in_order(node: Node, labels: Labels, wanted: Labels) -> bool:
    """Whether a node's dimensions, those of one aside, range over what a mask's last dimensions do."""
    shape = shape_of(node) or ()
    if len(shape) > 4:
        return False
    wanted = ((None,) * 4 + wanted)[-len(shape) :] if shape else ()
    return all(size == 1 or label == want for size, label, want in zip(shape, labels, wanted, strict=True))


def bound_of(node: Any, labels: Labels, source: Node, *, negated: bool) -> Bound | None:
    """A boolean node, or its negation, as a bound; ``source`` is remembered as the mask that says the same."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target in _NOT:
        return bound_of(node.args[0], labels, source, negated=not negated)
    if node.target in _COMPARE:
        return _compared(node, labels, source, negated)
    if node.target in (aten.tril.default, aten.triu.default):
        return _triangle(node, labels, source, negated)
    if node.target is aten._to_copy.default and node.meta["val"].dtype is torch.bool:
        source_target: Any = node.args[0].target  # type: ignore[union-attr]
        triangle = source_target in (aten.tril.default, aten.triu.default)
        return bound_of(node.args[0], labels, source, negated=negated) if triangle else None
    inner = inner_labels(node, labels)
    return None if inner is None else bound_of(node.args[0], inner, source, negated=negated)


def _compared(node: Node, labels: Labels, source: Node, negated: bool) -> Bound | None:
    one, other = (affine(a, labels) for a in node.args[:2])
    if one is None or other is None:
        return None
    sign = _COMPARE[node.target]  # type: ignore[index]
    sign = _NEGATED[sign] if negated else sign
    difference = one.plus(other, -1)
    if difference.token == -1:
        difference, sign = difference.times(-1), _SWAPPED[sign]
    if difference.token != 1 or difference.query not in (0, -1):
        return None
    value = Affine(terms=difference.terms, constant=difference.constant).times(-1)
    shift = 1 if sign in ("<=", ">") else 0
    found = Affine(terms=value.terms, constant=value.constant + shift)
    if abs(found.constant) >= FAR:
        return None
    return Bound(found, sign in ("<", "<="), difference.query == -1, source)


def _triangle(node: Node, labels: Labels, source: Node, negated: bool) -> Bound | None:
    """``ones.tril(d)`` is t <= s + d, ``ones.triu(d)`` is t >= s + d."""
    offset = node.args[1] if len(node.args) > 1 else 0
    if labels[-2:] != ("S", "T") or not isinstance(offset, int) or not _is_true(node.args[0]):  # type: ignore[arg-type]
        return None
    lower = node.target is aten.tril.default
    if negated:  # not t <= s + d  is  t >= s + d + 1
        return Bound(Affine(constant=offset + (1 if lower else 0)), not lower, True, source)
    return Bound(Affine(constant=offset + (1 if lower else 0)), lower, True, source)


def _is_true(node: Node) -> bool:
    """Whether every element is a constant other than zero, whatever the dtype."""
    if node.op != "call_function":
        return False
    if node.target in _FILLED:
        fill = node.args[2] if node.target is aten.new_full.default else node.args[1]
        return isinstance(fill, (bool, int, float)) and bool(fill)
    if node.target is aten.scalar_tensor.default:
        return bool(node.args[0]) and not isinstance(node.args[0], Node)
    outward = node.target in (aten.expand.default, aten.unsqueeze.default, aten.alias.default, aten.clone.default)
    cast = node.target is aten._to_copy.default
    return node.target in _ONES or ((outward or cast) and _is_true(node.args[0]))  # type: ignore[arg-type]


def never_binds(bound: Bound, tokens: Any) -> bool:
    """Whether a bound is known, when compiling, to hide nothing of so many tokens from any query."""
    value = static_value(bound.value)
    if value is None:
        return False
    if bound.upper:  # the first query sees least
        difference = value - tokens
        return difference >= 0 if isinstance(difference, int) else bool(difference == 0)
    return isinstance(value, int) and not bound.diagonal and value <= 0


def emit_value(emit: Emitter, bound: Bound, extra: int | Node = 0) -> Node:
    """A bound (for the query of index 0) and something added, as int64 ``[batch or 1]``."""
    device = next((n.meta["val"].device for n, _ in bound.value.terms if isinstance(n.meta["val"], torch.Tensor)), None)
    total: Node | None = None
    scalars: list[tuple[Node, int]] = []
    for node, factor in bound.value.terms:
        if isinstance(node.meta["val"], torch.SymInt):
            scalars.append((node, factor))
            continue
        flat = emit(aten.reshape.default, node, [-1])
        if flat.meta["val"].dtype is not torch.int64:
            flat = emit(aten._to_copy.default, flat, dtype=torch.int64)
        flat = flat if factor == 1 else emit(aten.mul.Tensor, flat, factor)
        total = flat if total is None else emit(aten.add.Tensor, total, flat)
    if total is not None:  # what is added below must not wrap
        total = emit(aten.clamp.default, total, -FAR, FAR)
    shift: int | Node = bound.value.constant
    for node, factor in [*scalars, *([(extra, 1)] if isinstance(extra, Node) else [])]:
        scaled = node if factor == 1 else emit(operator.mul, node, factor)
        shift = scaled if shift == 0 else emit(operator.add, scaled, shift)
    if isinstance(extra, int) and extra:
        shift = emit(operator.add, shift, extra) if isinstance(shift, Node) else shift + extra
    if total is None:
        device = emit.before.args[0].meta["val"].device if device is None else device  # type: ignore[union-attr]
        return emit(aten.full.default, [1], shift, dtype=torch.int64, device=device)
    return total if shift == 0 else emit(aten.add.Tensor, total, shift)


def emit_rows(emit: Emitter, values: list[Node], batch: int | Node, *, upper: bool) -> Node | None:
    """The narrowest of some bounds as contiguous int32 ``[batch]``, or None when there is none."""
    joined: Node | None = None
    for value in values:
        narrower = aten.minimum.default if upper else aten.maximum.default
        joined = value if joined is None else emit(narrower, joined, value)
    if joined is None:
        return None
    joined = emit(aten.clamp.default, joined, -FAR, 2 * FAR - 1)
    rows = emit(aten.expand.default, emit(aten._to_copy.default, joined, dtype=torch.int32), [batch])
    return emit(aten.clone.default, rows, memory_format=torch.contiguous_format)
