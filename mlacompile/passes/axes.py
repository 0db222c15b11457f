"""Axes of tensors in a graph: what each dimension ranges over.

A dimension is a list of *atoms* (labelled factors of its size, outermost first), so a ``view`` that merges head and
feature, or splits them again, is only a regrouping of atoms; and every shape is known as a product of atoms, so a
subgraph can be run again at small stand-in sizes (see ``probe.py``) although it was traced at real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

aten = torch.ops.aten

Size: TypeAlias = int | sympy.Expr
BATCH, HEAD, TOKEN, FEATURE = "B", "H", "T", "D"


@dataclass(frozen=True)
class Atom:
    """One factor of a dimension: what it ranges over, and how many values it takes."""

    label: str
    size: Size

    @property
    def resizable(self) -> bool:
        """Whether a stand-in may give this atom another size: batch and token atoms only."""
        return self.label in (BATCH, TOKEN)


Dim: TypeAlias = tuple[Atom, ...]
Dims: TypeAlias = tuple[Dim, ...]
Pulled: TypeAlias = list[tuple[Node, Dims]]


def size_of(value: Any) -> Size:
    """An int, or the symbolic expression behind a SymInt."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_Integer else expr
    return int(value)


def shape_of(node: Node) -> tuple[Size, ...] | None:
    """Shape of the tensor a node yields, or None when it is not a tensor."""
    val = node.meta.get("val")
    return tuple(size_of(s) for s in val.shape) if isinstance(val, torch.Tensor) else None


def labels(dims: Dims) -> set[str]:
    """All labels that occur in some dimensions."""
    return {a.label for d in dims for a in d}


def dims_for(shape: Sequence[Size], names: Sequence[str]) -> Dims:
    """One atom a dimension, named in order; dimensions of size one have none."""
    return tuple(() if s == 1 else (Atom(n, s),) for s, n in zip(shape, names, strict=True))


def renamed(dims: Dims, names: dict[str, str]) -> Dims:
    """The same dimensions with other labels."""
    return tuple(tuple(Atom(names.get(a.label, a.label), a.size) for a in d) for d in dims)


def whole_quotient(a: Size, b: Size) -> Size | None:
    """a / b when it divides exactly, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    q = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if q.is_Integer:
        return int(q)
    _, denominator = q.as_numer_denom()
    return q if denominator == 1 and all(c.is_Integer for c in q.as_coefficients_dict().values()) else None


def regroup(atoms: Sequence[Atom], sizes: Sequence[Size]) -> Dims | None:
    """Deal atoms, outermost first, into dimensions of the given sizes, splitting an atom where a border falls inside
    it.

    None when sizes do not match, or when a batch or token atom would be split.
    """
    rest = list(reversed(atoms))
    dims: list[Dim] = []
    for want in sizes:
        dim: list[Atom] = []
        left: Size = want
        while left != 1:
            if not rest:
                return None
            atom = rest.pop()
            quotient = whole_quotient(left, atom.size)
            if quotient is not None:
                dim.append(atom)
                left = quotient
                continue
            inner = whole_quotient(atom.size, left)
            if inner is None or atom.resizable:
                return None
            dim.append(Atom(atom.label, left))
            rest.append(Atom(atom.label, inner))
            left = 1
        # One new token: an axis that a dimension of one holds, or that of the batch when they are merged.
        while rest and rest[-1].size == 1 and (want == 1 or dim[-1].resizable):
            dim.append(rest.pop())
        dims.append(tuple(dim))
    while dims and rest and rest[-1].size == 1:
        dims[-1] = (*dims[-1], rest.pop())
    return None if rest else tuple(dims)


def without_ones(dims: Dims) -> Dims:
    """The same without axes of one, which a weight has not."""
    return tuple(tuple(a for a in d if a.size != 1) for d in dims)


def broadcast_dims(node: Node, dims: Dims) -> Dims | None:
    """Dims an operand must have had to broadcast to ``dims``: where it has size one, the atoms end."""
    shape = shape_of(node)
    if shape is None or len(shape) > len(dims):
        return None
    tail = dims[len(dims) - len(shape) :]
    return tuple(tuple(a for a in d if a.size == 1) if s == 1 else d for s, d in zip(shape, tail, strict=True))


def shape_with(dims: Dims, batch: Size | None = None, tokens: Size | None = None) -> tuple[Size, ...]:
    """The shape some dims stand for, with batch and token atoms resized when sizes are given."""
    stand_in = {BATCH: batch, TOKEN: tokens}
    shape: list[Size] = []
    for dim in dims:
        size: Size = 1
        for atom in dim:
            replaced = stand_in.get(atom.label)
            size = size * (atom.size if replaced is None else replaced)
        shape.append(size)
    return tuple(shape)


#: Ops that make a tensor out of nothing but a shape.
CONSTANT = {
    aten.new_empty.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.zeros.default,
    aten.zeros_like.default,
}
