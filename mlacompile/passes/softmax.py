"""Attention written out: scores that are products, a softmax over tokens, a product with V.

    scores = bmm(q, kᵀ) · factor  [+ bmm(q', k'ᵀ) · factor']  [+ mask | masked_fill]
    out    = bmm(softmax(scores), v)

Axes are followed back from the softmax to the products and forward to V, so the order of heads and queries in the
scores, and views and casts on the way, do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from mlacompile.passes.axes import REARRANGE, Atom, Dim, Dims, _broadcast, dims_for, pull, regroup, shape_of, size_of
from mlacompile.passes.emit import Emitter
from mlacompile.passes.source import op_name

aten = torch.ops.aten
MASKED = -1e4  # a score this low, or lower, has probability zero in float32
_RESHAPE = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
_ENDS = {aten.bmm.default, aten.mm.default, aten.addmm.default, aten._softmax.default, aten._safe_softmax.default}
_TERMS = {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self),
}
_FAR = 12  # more ops than any spelling of attention has between scores and softmax
_PASS = REARRANGE | {aten._to_copy.default: REARRANGE[aten.clone.default], aten.expand.default: None}


@dataclass
class _Product:
    node: Node
    dims: Dims
    factor: float


@dataclass
class _Scores:
    products: list[_Product] = field(default_factory=list)
    added: list[tuple[Node, Dims]] = field(default_factory=list)
    kept: list[tuple[Node, Dims, bool]] = field(default_factory=list)  # (condition, dims, True where it means "attend")


def match_softmax(node: Node) -> bool:
    """Replace the product with V behind one softmax by ``mlacompile::attention``; False when it is not attention."""
    shape = shape_of(node)
    if shape is None or len(shape) not in (3, 4) or node.args[1] not in (-1, len(shape) - 1):
        return False
    dims = dims_for(shape, [f"x{i}" for i in range(len(shape) - 1)] + ["T"])
    scores = _Scores()
    if not _terms(node.args[0], dims, 1.0, scores) or not scores.products:  # type: ignore[arg-type]
        return False
    value = _forward(node, dims)
    names = _name_axes(shape, scores.products[0])
    if value is None or names is None:
        return False
    _emit(scores, value, names)
    return True


def why_unmatched(softmax: Node) -> str | None:
    """Why a softmax that stands between two products, as in attention, was left alone; None when it does not stand
    there.

    Products with weights (``mm``) end the search on either side, so that a router's softmax is not taken for attention.
    """
    before = _between(softmax, lambda n: n.all_input_nodes)
    after = _between(softmax, lambda n: list(n.users), _is_weighted_sum)
    if before is None or after is None:
        return None
    if any(len(n.users) > 1 for n in (softmax, *after)):
        return (
            "the attention weights are used elsewhere than in the product with V (returned, summed or stored), so they "
            "have to be computed; do without them (output_attentions=False)"
        )
    way = [*before[::-1], *after]
    odd = [n for n in way if n.target not in _PASS and n.target not in _TERMS] or [*before[::-1], softmax, *after]
    names = ", ".join(op_name(n) for n in odd)
    return f"attention is not written as scale, mask, softmax and product with V: {names} in between"


def _is_weighted_sum(user: Node, weights: Node) -> bool:
    return user.args[0] is weights


def _between(
    softmax: Node, step: Callable[[Node], list[Node]], fits: Callable[[Node, Node], bool] = lambda product, node: True
) -> list[Node] | None:
    """Nodes on the shortest way from a softmax to a ``bmm`` in one direction, both ends left out; None without one."""
    ways: list[list[Node]] = [[softmax]]
    seen = {softmax}
    for way in ways:
        for node in step(way[-1]):
            if node.target is aten.bmm.default and fits(node, way[-1]):
                return way[1:]
            if node in seen or len(way) > _FAR or node.target in _ENDS or node.op != "call_function":
                continue
            seen.add(node)
            ways.append([*way, node])
    return None


def _scalar(value: Any) -> float | None:
    """A Python number, or the value of a zero-dimensional constant node."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Node) and value.target in (aten.scalar_tensor.default, aten.full.default):
        number = value.args[0] if value.target is aten.scalar_tensor.default else value.args[1]
        return float(number) if isinstance(number, (int, float)) else None
    return None


def _terms(node: Node, dims: Dims, factor: float, found: _Scores) -> bool:
    """Sort what the scores are made of into products and masks; False when something else is in it."""
    if node.op != "call_function":
        return False
    if node.target is aten.bmm.default:
        found.products.append(_Product(node, dims, factor))
        return True
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        number = _scalar(node.args[1])
        if number is None:
            return False
        factor = factor / number if "div" in str(node.target) else factor * number
        return _terms(node.args[0], dims, factor, found)  # type: ignore[arg-type]
    if node.target is aten.add.Tensor and isinstance(node.args[1], Node) and not node.kwargs:
        return _sum(node.args[0], node.args[1], dims, factor, found)  # type: ignore[arg-type]
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _kept(node.args[1], node.args[2], node.args[0], False, dims, factor, found)
    if node.target is aten.where.self:
        condition, yes, no = node.args
        if _scalar(no) is not None:
            return _kept(condition, no, yes, True, dims, factor, found)
        return _scalar(yes) is not None and _kept(condition, yes, no, False, dims, factor, found)
    if node.target in _PASS:
        pulled = pull(node, dims)
        return pulled is not None and len(pulled) == 1 and _terms(pulled[0][0], pulled[0][1], factor, found)
    return False


def _sum(a: Node, b: Node, dims: Dims, factor: float, found: _Scores) -> bool:
    for one, other in ((a, b), (b, a)):
        trial = _Scores()
        one_dims, other_dims = _broadcast(one, dims), _broadcast(other, dims)
        if one_dims != dims or other_dims is None or not _terms(one, dims, factor, trial) or not trial.products:
            continue
        second = _Scores()
        if other_dims == dims and _terms(other, dims, factor, second) and second.products:
            trial.products += second.products
            trial.added += second.added
            trial.kept += second.kept
        elif factor == 1.0:
            trial.added.append((other, other_dims))
        else:
            continue
        found.products += trial.products
        found.added += trial.added
        found.kept += trial.kept
        return True
    return False


def _kept(condition: Any, fill: Any, scores: Any, attend: bool, dims: Dims, factor: float, found: _Scores) -> bool:
    low = _scalar(fill)
    operand = _broadcast(condition, dims) if isinstance(condition, Node) else None
    if low is None or low * factor > MASKED or operand is None or not isinstance(scores, Node):
        return False
    found.kept.append((condition, operand, attend))
    return _terms(scores, dims, factor, found)


def _forward(softmax: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """The product with V that consumes the softmax, and the axes of its left operand."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        user = users[0]
        if user.target is aten.bmm.default:
            ends = user.args[0] is node and [a.label for a in dims[2]] == ["T"]
            return (user, dims) if ends else None
        pushed = _push(user, dims)
        if pushed is None:
            return None
        node, dims = user, pushed


def _push(node: Node, dims: Dims) -> Dims | None:
    """Axes of a node's output from those of its input, for the few ops that stand between softmax and V."""
    shape = shape_of(node)
    if shape is None or node.target not in _PASS:
        return None
    if node.target in _RESHAPE:
        return regroup([a for d in dims for a in d], shape)
    if node.target in (aten.transpose.int, aten.permute.default):
        if node.target is aten.permute.default:
            return tuple(dims[d] for d in node.args[1])  # type: ignore[union-attr,index,misc]
        moved = list(dims)
        i, j = node.args[1], node.args[2]
        moved[i], moved[j] = moved[j], moved[i]  # type: ignore[index]
        return tuple(moved)
    return dims if len(shape) == len(dims) else None


def _name_axes(shape: tuple[Any, ...], product: _Product) -> dict[str, str] | None:
    """Which axis of the scores is batch, head and query: the product runs over queries in its rows, not in its
    batch."""
    rows = [a.label for a in product.dims[1]]
    tokens = [a.label for a in product.dims[2]]
    free = list(range(len(shape) - 1))
    if tokens != ["T"] or len(rows) > 1:
        return None
    if rows:
        query = int(rows[0][1:])
    else:
        ones = [i for i in free if size_of(shape[i]) == 1]
        if not ones:
            return None
        query = ones[-1] if ones[-1] != 0 else None  # type: ignore[assignment]
        if query is None:
            return None
    others = [i for i in free if i != query]
    names = dict(zip([f"x{i}" for i in others], ["B", "H"][2 - len(others) :], strict=True))
    return names | {f"x{query}": "S", "T": "T"}


def _named(dims: Dims, names: dict[str, str]) -> Dims:
    return tuple(tuple(Atom(names.get(a.label, a.label), a.size) for a in d) for d in dims)


def _emit(scores: _Scores, value: tuple[Node, Dims], names: dict[str, str]) -> None:
    anchor, left = value
    left = _named(left, names)
    emit = Emitter(anchor)
    first = scores.products[0]
    queries, keys = [], []
    for product in scores.products:
        q, k = product.node.args[:2]
        axes = _named(product.dims, names)
        width: Dim = (Atom("D", shape_of(q)[-1]),)  # type: ignore[arg-type,index]
        q4 = emit.arrange(q, (axes[0], axes[1], width), "BHSD")  # type: ignore[arg-type]
        if product.factor != first.factor:
            q4 = emit(aten.mul.Tensor, q4, product.factor / first.factor)
        queries.append(q4)
        keys.append(emit.arrange(k, (axes[0], width, axes[2]), "BHTD"))  # type: ignore[arg-type]
    v = anchor.args[1]
    v_dims: Dims = (left[0], left[2], (Atom("D", shape_of(v)[-1]),))  # type: ignore[arg-type,index]
    attention = emit(
        torch.ops.mlacompile.attention.default,
        queries[0] if len(queries) == 1 else emit(aten.cat.default, queries, -1),
        keys[0] if len(keys) == 1 else emit(aten.cat.default, keys, -1),
        emit.arrange(v, v_dims, "BHTD"),  # type: ignore[arg-type]
        _mask(emit, scores, names),
        False,
        first.factor,
        False,
    )
    out = emit.merge(attention, "BHSD", (left[0], left[1], v_dims[2]))
    attention.meta["mlacompile_original"] = anchor
    attention.meta["mlacompile_anchor"] = out
    anchor.replace_all_uses_with(out)


def _mask(emit: Emitter, scores: _Scores, names: dict[str, str]) -> Node | None:
    mask: Node | None = None
    for node, dims in scores.added:
        term = emit.arrange(node, _named(dims, names), "BHST")
        mask = term if mask is None else emit(aten.add.Tensor, mask, term)
    keep: Node | None = None
    for node, dims, attend in scores.kept:
        term = emit.arrange(node, _named(dims, names), "BHST")
        term = term if attend else emit(aten.logical_not.default, term)
        keep = term if keep is None else emit(aten.logical_and.default, keep, term)
    if mask is None or keep is None:
        return keep if mask is None else mask
    low = emit(aten.full.default, [], float("-inf"), dtype=mask.meta["val"].dtype, device=mask.meta["val"].device)
    return emit(aten.where.self, keep, mask, low)
