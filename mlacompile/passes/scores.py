"""What attention scores are made of: products of queries and keys, each with a factor, under masks.

    scores = Σ product · factor  [+ mask · factor]  [where(keep, …, low)]  [+ anything that is the same for every token]

The walk goes from the softmax inwards and carries the axes along, so it does not matter where a scale stands, in which
order a sum is written, whether keys or queries are the left operand, or whether keys have heads at all. A term that is
the same for every token shifts all scores of a query alike; the softmax does not see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Node

from mlacompile.passes.axes import Atom, Dims, broadcast_dims, labels, shape_of
from mlacompile.passes.pull import REARRANGE, pull

aten = torch.ops.aten
TOKENS = "T"
MASKED = -1e4  # a score this low, or lower, has probability zero in float32
PRODUCTS = {aten.bmm.default, aten.mm.default, aten.baddbmm.default}
#: Ops through which scores and weights pass unchanged.
PASS = REARRANGE | {aten._to_copy.default: REARRANGE[aten.clone.default], aten.expand.default: None}
TERMS = {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.sub.Tensor),
    *(aten.neg.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self),
}


@dataclass(frozen=True)
class Factor:
    """A number times tensors that are the same for every token; True beside a tensor where it divides."""

    number: float = 1.0
    tensors: tuple[tuple[Node, Dims, bool], ...] = ()

    def times(self, number: float) -> Factor:
        """This factor and a number."""
        return replace(self, number=self.number * number)

    def by(self, value: Node, dims: Dims, divides: bool) -> Factor:
        """This factor and a tensor."""
        return replace(self, tensors=(*self.tensors, (value, dims, divides)))


@dataclass
class Product:
    """One product of queries and keys. Axes are those of the scores; the contracted one is ``D``."""

    q: Node
    q_dims: Dims
    k: Node
    k_dims: Dims
    factor: Factor


@dataclass(frozen=True)
class Kept:
    """A condition on tokens, with the axes of its dimensions.

    attend: what it says where a token is seen. uniform: other scores become one finite number, so that a query that
    sees nothing looks at all tokens alike.
    """

    condition: Node
    dims: Dims
    attend: bool
    uniform: bool


@dataclass
class Scores:
    """All terms of the scores."""

    products: list[Product] = field(default_factory=list)
    added: list[tuple[Node, Dims, Factor]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    shifted: bool = False  # something that is the same for every token was left out

    def __iadd__(self, other: Scores) -> Scores:
        self.products += other.products
        self.added += other.added
        self.kept += other.kept
        self.shifted |= other.shifted
        return self


def read_scores(node: Any, dims: Dims, dynamic: set[Node] | None = None, factor: Factor | None = None) -> Scores | None:
    """The terms of a node with these axes, or None when something else is in it.

    Args:
        dynamic: nodes that depend on more than weights; an unbatched product with a weight is a linear layer, not
            scores.
    """
    factor = factor or Factor()
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target in PRODUCTS:
        return _product(node, dims, dynamic, factor)
    if node.target in PASS:
        pulled = pull(node, dims)
        return read_scores(*pulled[0], dynamic, factor) if pulled is not None and len(pulled) == 1 else None
    for way in _ways(node, dims, dynamic, factor):
        found = way
        if found is not None:
            return found
    return None


def _ways(node: Node, dims: Dims, dynamic: set[Node] | None, factor: Factor) -> Iterator[Scores | None]:
    """Every way to take a pointwise node apart."""
    target, args = node.target, node.args
    if target is aten.neg.default:
        yield read_scores(args[0], dims, dynamic, factor.times(-1.0))
    elif target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        divides = "div" in str(target)
        if node.kwargs:
            return
        for scores, other in ((args[0], args[1]), (args[1], args[0])):
            yield _scaled(scores, other, divides, dims, dynamic, factor)
            if divides:
                return
    elif target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        sign = -1.0 if target is aten.sub.Tensor else 1.0
        yield _sum(args[0], args[1], factor, factor.times(sign), dims, dynamic)
        yield _sum(args[1], args[0], factor.times(sign), factor, dims, dynamic)
    elif target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        yield _kept(args[1], args[2], args[0], False, dims, dynamic, factor)
    elif target is aten.where.self:
        yield _kept(args[0], args[2], args[1], True, dims, dynamic, factor)
        yield _kept(args[0], args[1], args[2], False, dims, dynamic, factor)


def _product(node: Node, dims: Dims, dynamic: set[Node] | None, factor: Factor) -> Scores | None:
    terms = Scores()
    left, right = node.args[:2]
    if node.target is aten.baddbmm.default:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            return None
        if beta:
            bias: Node = node.args[0]  # type: ignore[assignment]
            bias_dims = broadcast_dims(bias, dims)
            if bias_dims is None:
                return None
            terms.added.append((bias, bias_dims, factor.times(float(beta))))
        left, right = node.args[1:3]
        factor = factor.times(float(alpha))
    assert isinstance(left, Node) and isinstance(right, Node)  # noqa: PT018
    if node.target is aten.mm.default and dynamic is not None and not {left, right} <= dynamic:
        return None
    width = (Atom("D", shape_of(left)[-1]),)  # type: ignore[index]
    left_dims: Dims = (*dims[:-1], width)
    right_dims: Dims = (*dims[:-2], width, dims[-1])
    if [a.label for a in dims[-1]] == [TOKENS]:
        terms.products.append(Product(left, left_dims, right, right_dims, factor))
    elif [a.label for a in dims[-2]] == [TOKENS]:
        terms.products.append(Product(right, right_dims, left, left_dims, factor))
    else:
        return None
    return terms


def _scaled(
    scores: Any, other: Any, divides: bool, dims: Dims, dynamic: set[Node] | None, factor: Factor
) -> Scores | None:
    if not isinstance(scores, Node) or broadcast_dims(scores, dims) != dims:
        return None
    number = scalar(other)
    if number is not None:
        return read_scores(scores, dims, dynamic, factor.times(1 / number if divides else number))
    axes = broadcast_dims(other, dims) if isinstance(other, Node) else None
    if axes is None or TOKENS in labels(axes):
        return None
    return read_scores(scores, dims, dynamic, factor.by(other, axes, divides))


def _sum(
    one: Any, other: Any, factor: Factor, other_factor: Factor, dims: Dims, dynamic: set[Node] | None
) -> Scores | None:
    """``one`` holds products; ``other`` holds more of them, or is a mask, or the same for every token."""
    if not isinstance(one, Node) or broadcast_dims(one, dims) != dims:
        return None
    found = read_scores(one, dims, dynamic, factor)
    if found is None or not found.products:
        return None
    axes = broadcast_dims(other, dims) if isinstance(other, Node) else ()
    if axes is None:
        return None
    if TOKENS not in labels(axes):
        found.shifted = True
        return found
    more = read_scores(other, dims, dynamic, other_factor) if axes == dims else None
    if more is not None and more.products:
        found += more
    else:
        found.added.append((other, axes, other_factor))
    return found


def _kept(
    condition: Any, fill: Any, scores: Any, attend: bool, dims: Dims, dynamic: set[Node] | None, factor: Factor
) -> Scores | None:
    if not isinstance(scores, Node) or broadcast_dims(scores, dims) != dims:
        return None
    low = scalar(fill)
    operand = broadcast_dims(condition, dims) if isinstance(condition, Node) else None
    if low is None or operand is None or factor.tensors or not low * factor.number <= MASKED:
        return None
    found = read_scores(scores, dims, dynamic, factor)
    if found is not None:
        found.kept.append(Kept(condition, operand, attend, math.isfinite(low)))
    return found


def scalar(value: Any) -> float | None:
    """A Python number, or the value of a zero-dimensional constant node."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Node):
        return None
    if value.target in (aten.scalar_tensor.default, aten.full.default):
        number = value.args[0] if value.target is aten.scalar_tensor.default else value.args[1]
        return float(number) if isinstance(number, (int, float)) else None
    if value.target in (aten.lift_fresh_copy.default, aten._to_copy.default, aten.clone.default):
        return scalar(value.args[0])
    return _constant(value) if value.op == "get_attr" else None


def _constant(node: Node) -> float | None:
    """The value of a constant such as ``torch.tensor(-1e9)``, which tracing leaves with the graph."""
    tensor = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1 or isinstance(tensor, FakeTensor):
        return None
    with unset_fake_temporarily():
        return float(tensor)
