"""What stands around a product of one row and can be done in the same pass over its weights.

    rms(x)                     before: the row is normalized on the way in
    residual + product         after: the residual is added on the way out
    act(product) · product     after: a gate and what it gates leave as one row

Found by their arithmetic alone. A rounding to 16 bits between two steps that become one is left out, which changes a
result by no more than that rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mlacompile.passes.pull import RESHAPES

aten = torch.ops.aten

_VIEWS = RESHAPES | {aten.alias.default, aten.clone.default}
_CAST = aten._to_copy.default


@dataclass(frozen=True)
class Norm:
    """Rows are x / sqrt(mean(x²) + eps) · weight; ``weight`` holds K elements, and ``x`` as many for every row, in some
    shape."""

    x: Node
    weight: Node
    eps: float


@dataclass(frozen=True)
class After:
    """``node`` is what is left when a product is merged with what follows it; gate or added says how."""

    node: Node
    gate: str = ""
    added: Node | None = None


def norm_before(rows: Node) -> Norm | None:
    """The RMS norm that rows ``[…, K]`` of floats come out of, or None."""
    value: Tensor = rows.meta["val"]
    width, size = value.shape[-1], _numel(rows)
    factors = [] if size is None else list(_factors(rows, size))
    roots = [f for f in factors if f.target is aten.rsqrt.default]
    if len(factors) != 3 or len(roots) != 1:
        return None
    mean_of = _mean_of_square(roots[0], width)
    rest = [f for f in factors if f is not roots[0]]
    if mean_of is None or mean_of[0] not in rest:
        return None
    x, eps = mean_of
    (weight,) = (f for f in rest if f is not x) if rest[0] is not rest[1] else (x,)
    fits = _numel(x) == size and weight.meta["val"].shape[-1] == _numel(weight) == width
    return Norm(x, weight, eps) if fits and x.meta["val"].dtype == value.dtype else None


def _factors(node: Node, size: int) -> Iterator[Node]:
    """What is multiplied to make a node of so many elements, casts and views between the factors aside."""
    node = through_views(node)
    if node.target is aten.mul.Tensor and all(isinstance(a, Node) for a in node.args) and _numel(node) == size:
        for factor in node.args:
            yield from _factors(factor, size)  # type: ignore[arg-type]
    else:
        yield node


def _mean_of_square(root: Node, width: int) -> tuple[Node, float] | None:
    """x and eps of 1 / sqrt(mean(x²) + eps) over a last dimension of ``width``."""
    total: Any = root.args[0]
    if total.target not in (aten.add.Tensor, aten.add.Scalar) or not isinstance(total.args[1], (int, float)):
        return None
    mean = through_views(total.args[0])
    if mean.target is not aten.mean.dim or not mean.args[0].meta["val"].dtype.is_floating_point:  # type: ignore[union-attr]
        return None
    square: Any = mean.args[0]
    rank, dims = square.meta["val"].dim(), mean.args[1]
    wide = square.meta["val"].dtype.itemsize >= 4 and square.meta["val"].shape[-1] == width
    if [d % rank for d in dims] != [rank - 1] or not wide:  # type: ignore[union-attr]
        return None
    if square.target is aten.pow.Tensor_Scalar and square.args[1] == 2:
        return through_views(square.args[0]), float(total.args[1])
    same = square.target is aten.mul.Tensor and square.args[0] is square.args[1]
    return (through_views(square.args[0]), float(total.args[1])) if same else None


def through_views(node: Node) -> Node:
    """Past views and casts between floats."""
    while node.op == "call_function" and (node.target in _VIEWS or _is_float_cast(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_float_cast(node: Node) -> bool:
    if node.target is not _CAST:
        return False
    one, other = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    return bool(one.dtype.is_floating_point and other.dtype.is_floating_point)


def _numel(node: Node) -> int | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or any(isinstance(s, torch.SymInt) for s in value.shape):
        return None
    return math.prod(value.shape)


def sum_after(product: Node) -> After | None:
    """The sum of a product ``[1, N]`` and a row that is there anyway, if nothing else uses the product."""
    last = _only_views(product)
    user = _only_user(last)
    if user is None or user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return None
    other = next((a for a in user.args[:2] if a is not last), None)
    if not isinstance(other, Node):
        return None
    one, two = last.meta["val"], other.meta.get("val")
    alike = isinstance(two, Tensor) and two.dtype == one.dtype and two.shape == one.shape and two.device == one.device
    return After(user, added=other) if alike else None


def gate_after(first: Node, second: Node) -> After | None:
    """The product of an activation of one product with the other, if nothing else uses either."""
    for gate, up in ((first, second), (second, first)):
        last, other = _only_views(gate), _only_views(up)
        activation = _only_user(last)
        name = None if activation is None else activation_of(activation)
        if activation is None or name is None:
            continue
        activated = _only_views(activation)
        user = _only_user(activated)
        if user is None or user is not _only_user(other) or user.target is not aten.mul.Tensor:
            continue
        if set(user.args) == {activated, other} and activated.meta["val"].shape == other.meta["val"].shape:
            return After(user, gate=name)
    return None


def gate_of(after: After, first: Node) -> bool:
    """Whether it is the first product of a pair that goes through the activation."""
    last = _only_user(_only_views(first))
    return last is not None and activation_of(last) == after.gate


def activation_of(node: Node) -> str | None:
    """The name of the activation that a node is, if it is one."""
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return None


def _only_views(node: Node) -> Node:
    """The last of the views that alone use a node, each the only user of the one before."""
    while True:
        user = _only_user(node)
        if user is None or user.target not in _VIEWS:
            return node
        node = user


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
