"""Write what was matched around a softmax as one attention op: queries, keys, values, a mask and a sink."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from mlacompile.passes.axes import Atom, Dims, renamed, shape_of
from mlacompile.passes.emit import Emitter
from mlacompile.passes.scores import Factor, Kept, Product, Scores

aten = torch.ops.aten
NEVER = -1e30  # added to a score leaves nothing of it, in float32 and float64, and does not overflow where it is scaled


@dataclass(frozen=True)
class Match:
    """Attention around a softmax. sink: one more score a head and query, with the axes of the scores (tokens gone)."""

    scores: Scores
    product: Node
    weights_dims: Dims
    weights_left: bool
    sink: tuple[Node, Dims] | None
    names: dict[str, str]


def emit_attention(match: Match) -> None:
    """Put one attention op in the place of what was matched."""
    anchor, names, scores = match.product, match.names, match.scores
    emit = Emitter(anchor)
    first = scores.products[0].factor.number
    weights = renamed(match.weights_dims, names)
    v = anchor.args[1 if match.weights_left else 0]
    v_shape = shape_of(v)  # type: ignore[arg-type]
    assert v_shape is not None
    width = (Atom("D", v_shape[-1 if match.weights_left else -2]),)
    tokens = weights[-1 if match.weights_left else -2]
    rows = weights[-2 if match.weights_left else -1]
    v_dims = (*weights[:-2], tokens, width) if match.weights_left else (*weights[:-2], width, tokens)
    queries = [_queries(emit, p, names, first) for p in scores.products]
    heads, dtype = queries[0].meta["val"].shape[1], anchor.meta["val"].dtype
    keys = [_keys(emit, p.k, renamed(p.k_dims, names), heads) for p in scores.products]
    attention = emit(
        torch.ops.mlacompile.attention.default,
        *(_joined(emit, parts, dtype) for parts in (queries, keys)),
        _keys(emit, v, v_dims, heads),  # type: ignore[arg-type]
        _mask(emit, scores, names),
        False,
        first,
        False,
        **_sink_argument(emit, match),
    )
    out_dims = (*weights[:-2], rows, width) if match.weights_left else (*weights[:-2], width, rows)
    out = emit.merge(attention, "BHSD", out_dims)
    if not match.weights_left:  # what follows was traced on the result of a product, and may view it
        out = emit(aten.clone.default, out, memory_format=torch.contiguous_format)
    attention.meta["mlacompile_original"] = anchor
    attention.meta["mlacompile_anchor"] = out
    anchor.replace_all_uses_with(out)


def _queries(emit: Emitter, product: Product, names: dict[str, str], first: float) -> Node:
    """Queries ``[B, H, S, D]``, with their factor divided by the number that goes into the scale."""
    q = emit.arrange(product.q, renamed(product.q_dims, names), "BHSD")
    if product.factor.number != first:
        q = emit(aten.mul.Tensor, q, product.factor.number / first)
    return _by_tensors(emit, q, product.factor, names)


def _joined(emit: Emitter, parts: list[Node], dtype: torch.dtype) -> Node:
    """The parts side by side, in the dtype of the output: scores of half precision operands are float32 anyway."""
    whole = parts[0] if len(parts) == 1 else emit(aten.cat.default, parts, -1)
    return whole if whole.meta["val"].dtype is dtype else emit(aten._to_copy.default, whole, dtype=dtype)


def _by_tensors(emit: Emitter, x: Node, factor: Factor, names: dict[str, str]) -> Node:
    for value, dims, divides in factor.tensors:
        term = emit.arrange(value, renamed(dims, names), "BHST")
        x = emit(aten.div.Tensor if divides else aten.mul.Tensor, x, term)
    return x


def _keys(emit: Emitter, x: Node, dims: Dims, heads: int) -> Node:
    """Keys or values ``[B, H, T, D]``, expanded over heads where all share them."""
    x = emit.arrange(x, dims, "BHTD")
    shared = x.meta["val"].shape[1] == 1 and heads != 1
    return emit(aten.expand.default, x, [-1, heads, -1, -1]) if shared else x


def _sink_argument(emit: Emitter, match: Match) -> dict[str, Node]:
    if match.sink is None:
        return {}
    return {"sink": emit.arrange(match.sink[0], renamed(match.sink[1], match.names), "BHST")}


def _mask(emit: Emitter, scores: Scores, names: dict[str, str]) -> Node | None:
    mask: Node | None = None
    for node, dims, factor in scores.added:
        term = emit.arrange(node, renamed(dims, names), "BHST")
        term = term if factor.number == 1.0 else emit(aten.mul.Tensor, term, factor.number)
        term = _by_tensors(emit, term, factor, names)
        mask = term if mask is None else emit(aten.add.Tensor, mask, term)
    for uniform in (True, False):
        kept = [k for k in scores.kept if k.uniform is uniform]
        keep = _all_of(emit, kept, names)
        if keep is None:
            continue
        if mask is None and not uniform:
            return keep
        mask = _hidden(emit, keep, mask, NEVER if uniform else -math.inf)
    return mask


def _all_of(emit: Emitter, kept: list[Kept], names: dict[str, str]) -> Node | None:
    keep: Node | None = None
    for one in kept:
        condition, attend = one.condition, one.attend
        if condition.target in (aten.logical_not.default, aten.bitwise_not.default):
            condition, attend = condition.args[0], not attend  # type: ignore[assignment]
        term = emit.arrange(condition, renamed(one.dims, names), "BHST")
        term = term if attend else emit(aten.logical_not.default, term)
        keep = term if keep is None else emit(aten.logical_and.default, keep, term)
    return keep


def _hidden(emit: Emitter, keep: Node, mask: Node | None, low: float) -> Node:
    """An additive mask, or zero, where tokens are kept, and ``low`` elsewhere."""
    device = keep.meta["val"].device
    dtype = torch.float32 if mask is None else torch.promote_types(mask.meta["val"].dtype, torch.float32)
    values = [emit(aten.full.default, [], value, dtype=dtype, device=device) for value in (0.0, low)]
    return emit(aten.where.self, keep, values[0] if mask is None else emit.cast(mask, dtype), values[1])
