"""Masks that say no more than "tokens from here to there".

    mask[b, 0, 0, t] = (t <= position) & (t >= first[b]) & …        →   start[b] <= t < length[b]

A range is two integers a row where a mask is a byte a token, and a kernel that knows it can copy whole tiles.
Recognised are comparisons
of the token's index with anything that does not depend on the token, joined by "and", under any broadcasting.
Everything else stays a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mlacompile.passes.axes import shape_of
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten

_AND = {aten.logical_and.default, aten.bitwise_and.Tensor}
_COMPARE = {aten.le.Tensor: "<=", aten.lt.Tensor: "<", aten.ge.Tensor: ">=", aten.gt.Tensor: ">"}
_INTEGERS = (torch.int32, torch.int64)  # a bound of another dtype rounds, or wraps when it is shifted
_FAR = 2**30  # longer than any cache, and with a shift still an int32
_SWAPPED = {"<=": ">=", "<": ">", ">=": "<=", ">": "<"}


@dataclass(frozen=True)
class Bound:
    """``value + shift``: the first visible token (``upper`` False), or the first that is not (``upper`` True)."""

    value: Node
    shift: int
    upper: bool


def bounds_of(mask: Node) -> list[Bound] | None:
    """Bounds that together are the mask, or None when it is not a range. Tokens run along the last dimension."""
    if mask.op != "call_function":
        return None
    if mask.target in _AND:
        parts = [bounds_of(a) for a in mask.args[:2]]  # type: ignore[arg-type]
        return None if None in parts else [b for p in parts for b in p or ()]
    if mask.target in _COMPARE:
        sign = _COMPARE[mask.target]
        return _compared(mask.args[0], sign, mask.args[1]) or _compared(mask.args[1], _SWAPPED[sign], mask.args[0])
    source = _outward(mask)
    return None if source is None else bounds_of(source)


def _outward(node: Node) -> Node | None:
    """The operand of an op that only broadcasts or adds dimensions in front of the last, which it keeps."""
    if node.target in (aten.expand.default, aten.alias.default, aten.clone.default):
        source: Node = node.args[0]  # type: ignore[assignment]
        shapes = shape_of(node), shape_of(source)
        kept = shapes[0] is not None and shapes[1] is not None and shapes[0][-1] == shapes[1][-1]
        return source if kept else None
    if node.target is aten.unsqueeze.default:
        rank = len(shape_of(node) or ())
        dim: int = node.args[1]  # type: ignore[assignment]
        return node.args[0] if dim % rank < rank - 1 else None  # type: ignore[return-value]
    return None


def _compared(token: Any, sign: str, other: Any) -> list[Bound] | None:
    shift = _token_index(token)
    shape = shape_of(other) if isinstance(other, Node) else None
    if shift is None or abs(shift) >= _FAR or shape is None or (len(shape) > 0 and shape[-1] != 1):
        return None
    if other.meta["val"].dtype not in _INTEGERS:
        return None
    upper = sign in ("<", "<=")
    return [Bound(other, -shift + (1 if sign in ("<=", ">") else 0), upper)]


def _token_index(node: Any) -> int | None:
    """c when the node is t + c for the token's index t along its last dimension."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is aten.arange.default:
        return 0
    if node.target is aten.arange.start:
        return node.args[0] if isinstance(node.args[0], int) else None
    if node.target is aten.add.Tensor and isinstance(node.args[1], int) and not node.kwargs:
        inner = _token_index(node.args[0])
        return None if inner is None else inner + node.args[1]
    source = _outward(node)
    return None if source is None else _token_index(source)


def emit_range(emit: Emitter, bounds: list[Bound], batch: int | Node) -> tuple[Node | None, Node | None]:
    """``start`` and ``length`` as int32 ``[B]``, each None where nothing bounds it."""
    return tuple(_joined(emit, [b for b in bounds if b.upper is upper], batch) for upper in (False, True))  # type: ignore[return-value]


def _joined(emit: Emitter, bounds: list[Bound], batch: int | Node) -> Node | None:
    joined: Node | None = None
    for bound in bounds:
        flat = emit(aten.clamp.default, emit(aten.reshape.default, bound.value, [-1]), -_FAR, _FAR)
        value = emit(aten.add.Tensor, flat, bound.shift)
        narrower = aten.minimum.default if bound.upper else aten.maximum.default
        joined = value if joined is None else emit(narrower, joined, value)
    if joined is None:
        return None
    rows = emit(aten.expand.default, emit(aten._to_copy.default, joined, dtype=torch.int32), [batch])
    return emit(aten.clone.default, rows, memory_format=torch.contiguous_format)
