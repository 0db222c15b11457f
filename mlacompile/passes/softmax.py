"""Attention written out: scores that are products, a softmax over tokens, a product with V.

    scores = bmm(q, kᵀ) · factor  [+ bmm(q', k'ᵀ) · factor']  [+ mask | masked_fill]       (``scores.py``)
    out    = bmm(softmax(scores), v)       or with a sink:  bmm(softmax([scores, sink])[..., :T], v)

Axes are followed back from the softmax to the products and forward to V, so the order of heads and queries in the
scores, and views and casts on the way, do not matter. Nor do keys without heads: they are the same for every head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from mlacompile.passes.axes import Atom, Dims, dims_for, labels, regroup, shape_of
from mlacompile.passes.emit_attention import Match, emit_attention
from mlacompile.passes.pull import RESHAPES, pull, upstream
from mlacompile.passes.scores import PASS, PRODUCTS, TERMS, TOKENS, Scores, read_scores, scalar
from mlacompile.passes.source import GRAPH_BREAK, behind_graph_break, op_name

aten = torch.ops.aten
_ENDS = {*PRODUCTS, aten.addmm.default, aten._softmax.default, aten._safe_softmax.default}
_FAR = 12  # more ops than any spelling of attention has between scores and softmax


@dataclass(frozen=True)
class Softmax:
    """A softmax however written: ``out = softmax(scores)`` along dimension ``dim``."""

    out: Node
    scores: Node
    dim: int


def softmaxes(graph: Graph) -> Iterator[Softmax]:
    """Every softmax of a graph: the library's, and ``exp(x) / exp(x).sum()``."""
    for target in (aten._softmax.default, aten._safe_softmax.default):
        for node in graph.find_nodes(op="call_function", target=target):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
            yield Softmax(node, node.args[0], dim % len(shape_of(node) or (1,)))  # type: ignore[arg-type,operator]
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        top, bottom = node.args[:2]
        if not isinstance(bottom, Node) or bottom.target is not aten.sum.dim_IntList or bottom.args[0] is not top:
            continue
        dims: Any = bottom.args[1]
        keep = bottom.args[2] if len(bottom.args) > 2 else bottom.kwargs.get("keepdim", False)
        if isinstance(top, Node) and top.target is aten.exp.default and keep and len(dims) == 1:
            yield Softmax(node, top.args[0], dims[0] % len(shape_of(node) or (1,)))  # type: ignore[arg-type]


class NotAttention(Exception):
    """A softmax between products that is not attention over heads; the message is a reason a user can read."""


def match_softmax(softmax: Softmax, dynamic: set[Node] | None = None) -> bool:
    """Replace the product with V behind one softmax by ``mlacompile::attention``; False when it is not attention.

    Args:
        dynamic: nodes that depend on more than weights. It tells heads, which a projection makes, from queries.
    Raises:
        NotAttention: it is attention of another kind.
    """
    shape = shape_of(softmax.out)
    if shape is None or not 2 < len(shape) < 6:
        return False
    axes = dims_for(shape, [TOKENS if i == softmax.dim else f"x{i}" for i in range(len(shape))])
    match = _match(softmax, axes, dynamic)
    if match is None:
        return False
    split = _taken_apart(match, axes)
    if split is not None:
        match = _match(softmax, split, dynamic) or match
    emit_attention(match)
    return True


def why_unmatched(softmax: Softmax) -> str | None:
    """Why a softmax that stands between two products, as in attention, was left alone; None when it does not stand
    there.

    Products with weights (``mm``) end the search on either side, so that a router's softmax is not taken for attention.
    """
    before = _between(softmax.out, lambda n: n.all_input_nodes)
    after = _between(softmax.out, lambda n: list(n.users), _is_weighted_sum)
    if before is None or after is None:
        return None
    if shape_of(softmax.out)[softmax.dim] == 1:  # type: ignore[index]
        return "a context of one token: there is nothing to keep compressed yet"
    if any(len(n.users) > 1 for n in (softmax.out, *after)):
        if behind_graph_break(softmax.out):
            return f"the attention weights leave the graph, so they have to be computed: {GRAPH_BREAK}"
        return (
            "the attention weights are used elsewhere than in the product with V (returned, summed or stored), so they "
            "have to be computed; do without them (output_attentions=False)"
        )
    way = [*before[::-1], *after]
    odd = [n for n in way if n.target not in PASS and n.target not in TERMS]
    names = ", ".join(op_name(n) for n in odd or [*before[::-1], softmax.out, *after])
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
            if node.target in (aten.bmm.default, aten.baddbmm.default) and fits(node, way[-1]):
                return way[1:]
            if node in seen or len(way) > _FAR or node.target in _ENDS or node.op != "call_function":
                continue
            seen.add(node)
            ways.append([*way, node])
    return None


def _match(softmax: Softmax, axes: Dims, dynamic: set[Node] | None) -> Match | None:
    """All parts of the attention around a softmax whose result has these axes."""
    if [a.label for a in axes[softmax.dim]] != [TOKENS]:
        return None
    node, start = softmax.out, _unshifted(softmax.scores, softmax.dim)
    sink = _sink(softmax, start)
    if sink is not None:
        node, start, extra = sink
        tokens = shape_of(node)[softmax.dim]  # type: ignore[index]
        axes = (*axes[: softmax.dim], (Atom(TOKENS, tokens),), *axes[softmax.dim + 1 :])
        sunk = extra, (*axes[: softmax.dim], (), *axes[softmax.dim + 1 :])
    scores = read_scores(start, axes, dynamic)
    value, zeroed = _forward(node, axes)
    if scores is None or not scores.products or value is None or (sink is not None and scores.shifted):
        return None
    if zeroed and not _hidden_already(zeroed, scores):
        raise NotAttention(
            "attention weights are set to zero after the softmax where scores were not hidden before it; hide scores"
        )
    names = _name_axes(axes, scores, dynamic)
    return None if names is None else Match(scores, *value, None if sink is None else sunk, names)


def _hidden_already(zeroed: list[tuple[Any, bool]], scores: Scores) -> bool:
    """Whether weights were only set to zero where scores are hidden. Then a query that sees nothing gets zeros."""
    for i, kept in enumerate(scores.kept):
        if (kept.condition, kept.attend) in zeroed:
            scores.kept[i] = replace(kept, uniform=False)
    return all(any((k.condition, k.attend) == zero for k in scores.kept) for zero in zeroed)


def _unshifted(node: Node, dim: int) -> Node:
    """Scores before something that is the same for every token, such as their maximum, was subtracted."""
    while node.op == "call_function":
        shapes = [shape_of(a) for a in node.args[:2] if isinstance(a, Node)]
        same = shapes and shapes[0] == shape_of(node)
        if node.target is aten._to_copy.default and same:
            node = node.args[0]  # type: ignore[assignment]
        elif node.target is aten.sub.Tensor and same and len(shapes) == 2 and not node.kwargs:
            if shapes[1] is None or len(shapes[1]) != len(shapes[0] or ()) or shapes[1][dim] != 1:
                return node
            node = node.args[0]  # type: ignore[assignment]
        else:
            return node
    return node


def _sink(softmax: Softmax, start: Node) -> tuple[Node, Node, Node] | None:
    """A softmax over one score more than there are tokens: (weights of the tokens, scores of the tokens, the sink)."""
    users = list(softmax.out.users)
    if start.target is not aten.cat.default or len(users) != 1 or users[0].target is not aten.slice.Tensor:
        return None
    parts: Any = start.args[0]
    rank = len(shape_of(start) or (1,))
    if len(parts) != 2 or (start.args[1] if len(start.args) > 1 else 0) % rank != softmax.dim:  # type: ignore[operator]
        return None
    widths = [shape_of(p)[softmax.dim] for p in parts]  # type: ignore[index]
    kept = shape_of(users[0])
    cut = users[0].args[1] if len(users[0].args) > 1 else 0
    first = users[0].args[2] if len(users[0].args) > 2 else None
    if cut % rank != softmax.dim or kept is None:  # type: ignore[operator]
        return None
    for tokens, extra, begin in ((0, 1, (None, 0)), (1, 0, (1,))):
        if widths[extra] == 1 and widths[tokens] == kept[softmax.dim] and first in begin:
            return users[0], parts[tokens], parts[extra]
    return None


def _forward(softmax: Node, dims: Dims) -> tuple[tuple[Node, Dims, bool] | None, list[tuple[Any, bool]]]:
    """The product with V that consumes the softmax, the axes of the weights in it, and whether they are on the left;
    and the conditions under which weights are set to zero before (where they hold, or with True where they do not)."""
    node, zeroed = softmax, list[tuple[Any, bool]]()
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in (aten.bmm.default, aten.mm.default):
            left = user.args[0] is node
            if len(set(user.args[:2])) == 2 and [a.label for a in dims[-1 if left else -2]] == [TOKENS]:
                return (user, dims, left), zeroed
            return None, zeroed
        zero = _zeroed(user, node)
        zeroed += [] if zero is None else [zero]
        pushed = dims if zero is not None or _ends_nan(user) else _push(user, dims)
        if pushed is None:
            return None, zeroed
        node, dims = user, pushed
    return None, zeroed


def _zeroed(node: Node, weights: Node) -> tuple[Any, bool] | None:
    """The condition under which a node sets weights to zero; True beside it where it says which are kept."""
    args: Any = node.args
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return (args[1], False) if args[0] is weights and scalar(args[2]) == 0 else None
    if node.target is aten.where.self and shape_of(node) == shape_of(weights):
        for kept, other, attend in ((args[1], args[2], True), (args[2], args[1], False)):
            if kept is weights and scalar(other) == 0:
                return args[0], attend
    return None


def _ends_nan(node: Node) -> bool:
    """Whether a node makes zeros of the weights of a query that sees nothing, which is what they are in the op."""
    return node.target is aten.nan_to_num.default and (len(node.args) < 2 or node.args[1] in (None, 0))


def _push(node: Node, dims: Dims) -> Dims | None:
    """Axes of a node's output from those of its input, for the few ops that stand between softmax and V."""
    shape = shape_of(node)
    if shape is None or node.target not in PASS:
        return None
    if node.target in RESHAPES:
        return regroup([a for d in dims for a in d], shape)
    if node.target in (aten.transpose.int, aten.permute.default):
        if node.target is aten.permute.default:
            return tuple(dims[d] for d in node.args[1])  # type: ignore[union-attr,index,misc]
        moved = list(dims)
        i, j = node.args[1], node.args[2]
        moved[i], moved[j] = moved[j], moved[i]  # type: ignore[index]
        return tuple(moved)
    if node.target is aten.expand.default and len(shape) == len(dims):
        source = shape_of(node.args[0])  # type: ignore[arg-type]
        return dims if source == shape else None
    return dims if len(shape) == len(dims) else None


def _taken_apart(match: Match, axes: Dims) -> Dims | None:
    """Three-dimensional scores, such as ``[batch · heads, queries, tokens]``, with the axis taken apart that the
    queries were put together from; None when there is none."""
    if len(axes) != 3:
        return None
    product = match.scores.products[0]
    single = {d[0].label for d in axes if len(d) == 1} - {TOKENS}
    for _, dims in upstream(product.q, product.q_dims):
        for label in single:
            atoms = [a for d in dims for a in d if a.label == label]
            if len(atoms) == 2:
                parts = tuple(Atom(f"{label}.{i}", a.size) for i, a in enumerate(atoms))
                return tuple(parts if d and d[0].label == label else d for d in axes)
    return None


def heads_of(scores: Scores, candidates: set[str], dynamic: set[Node] | None) -> str | None:
    """Which of the axes is heads: the one that a weight gives to queries or keys."""
    if dynamic is None:
        return None
    for product in scores.products:
        for node, dims in ((product.q, product.q_dims), (product.k, product.k_dims)):
            for weight, axes in _weights_of(node, dims, dynamic):
                found = labels(axes) & candidates
                if len(found) == 1 and weight not in dynamic:
                    return found.pop()
    return None


def _weights_of(node: Node, dims: Dims, dynamic: set[Node]) -> Iterator[tuple[Node, Dims]]:
    """The weights that a tensor was multiplied with on its way."""
    for here, axes in upstream(node, dims):
        if here in dynamic and here.target in (*PRODUCTS, aten.addmm.default):
            yield from ((n, d) for n, d in pull(here, axes) or () if n not in dynamic)


def _name_axes(axes: Dims, scores: Scores, dynamic: set[Node] | None) -> dict[str, str] | None:
    """Which axis of the scores is batch, head and query: those that keys have not are queries, and perhaps heads."""
    present = [a.label for d in axes for a in d if a.label != TOKENS]
    shared = [x for x in present if all(x in labels(p.k_dims) for p in scores.products)]
    rows = [x for x in present if x not in shared]
    head = heads_of(scores, set(present), dynamic)
    if len(rows) == 2 and len(shared) == 2:
        raise NotAttention("query heads share key heads in groups: grouped-query attention has no latent")
    if len(rows) > 2 or len(shared) > 2:
        return None
    if head is None:
        head = _guess_head(axes, scores, shared, rows, dynamic)
    queries = [x for x in rows if x != head]
    batch = [x for x in shared if x != head]
    if len(queries) > 1 or len(batch) > 1:
        return None
    names = {TOKENS: TOKENS} | dict.fromkeys(queries, "S") | dict.fromkeys(batch, "B")
    return names if head is None else names | {head: "H"}


def _guess_head(
    axes: Dims, scores: Scores, shared: list[str], rows: list[str], dynamic: set[Node] | None
) -> str | None:
    """Heads where no weight tells: of two axes that only queries have, the one no mask knows; else behind batch."""
    if len(rows) == 2:
        masks = [labels(d) for d in (*(a[1] for a in scores.added), *(k.dims for k in scores.kept))]
        unmasked = [x for x in rows if not any(x in m for m in masks)]
        return unmasked[0] if len(unmasked) == 1 else rows[0]
    if len(shared) == 2:
        return shared[1]
    first = next((d[0].label for d in axes if d), None)
    keys = [(p.k, p.k_dims) for p in scores.products]
    if dynamic is not None and any(n not in dynamic for k in keys for n, _ in _weights_of(*k, dynamic)):
        return None  # a weight made the keys, and gave them no heads: there is one
    return shared[0] if shared and (len(axes) == 3 or shared[0] != first or not axes[0]) else None
