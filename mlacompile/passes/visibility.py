"""What each query of an attention op sees, as arguments of ours: a range of tokens, causality, and a mask for the
rest.

    mask                                                        start   length        causal   mask
    t <= s + position                       causal              –       position + S  yes      –
    … & padding[b, t]                       causal, padded      –       position + S  yes      padding [B, 1, T]
    … & t > s + position - W                sliding window      its start             yes      the window
    t < length[b]                           rows                –       length        no       –
    anything else                           opaque              –       –             no       the mask

The last S of ``length`` tokens are the queries' own when ``causal``: query s sees t < length - S + s + 1, as
``mla_decode``
defines it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Node

from mlacompile.passes.affine import Affine, Labels, inner_labels, static_value, trailing
from mlacompile.passes.axes import Size, shape_of
from mlacompile.passes.emit import Emitter
from mlacompile.passes.ranges import Bound, Conjunction, bound_of, conjunction, emit_rows, emit_value, never_binds
from mlacompile.passes.recognize import Attention, mask_without_heads
from mlacompile.passes.scores import MASKED

aten = torch.ops.aten


@dataclass(frozen=True)
class Visibility:
    """What the queries see.

    queries, tokens: how many there are. bounds: ends of a range of tokens. masks: boolean masks that must hold
    besides.
    additive: a mask that is added to the scores instead.
    """

    queries: Size
    tokens: Size
    bounds: tuple[Bound, ...] = ()
    masks: tuple[Node, ...] = ()
    additive: Node | None = None

    def ends(self, *, upper: bool, diagonal: bool) -> list[Bound]:
        """Bounds of one sort; a single query has index 0, and then each bound is one of a row."""
        several = self.queries != 1
        return [b for b in self.bounds if b.upper is upper and (b.diagonal and several) is diagonal]

    @property
    def causal(self) -> bool:
        """Whether the last token a query sees moves on with it."""
        return bool(self.ends(upper=True, diagonal=True))

    @property
    def windowed(self) -> bool:
        """Whether the first token a query sees moves on with it."""
        return bool(self.ends(upper=False, diagonal=True))

    @property
    def binding(self) -> list[Bound]:
        """Bounds of a row that may hide something."""
        rows = self.ends(upper=True, diagonal=False) + self.ends(upper=False, diagonal=False)
        return [b for b in rows if not never_binds(b, self.tokens)]

    @property
    def whole(self) -> bool:
        """Whether nothing is hidden, or nothing but a triangle over queries that are all tokens there are."""
        ends = self.ends(upper=True, diagonal=True)
        square = all(e.value == Affine(constant=1) for e in ends) and (not ends or self.queries == self.tokens)
        return square and not (self.binding or self.masks or self.windowed or self.additive is not None)

    @property
    def opaque(self) -> bool:
        """Whether what a query sees depends on which one it is in a way that stays a mask."""
        return self.windowed or self.additive is not None or not all(map(_same_for_all_queries, self.masks))

    def describe(self) -> str:
        """In a few words, for the report."""
        words = ["causal"] if self.causal else []
        words += ["sliding window"] if self.windowed else []
        words += ["a range of tokens"] if self.binding else []
        by_token = sum(map(_same_for_all_queries, self.masks))
        words += ["padding" if self.queries != 1 else "a mask of tokens"] if by_token else []
        words += ["an opaque mask"] if len(self.masks) > by_token else []
        words += ["a mask that is added"] if self.additive is not None else []
        return ", ".join(words) or "everything"


@dataclass(frozen=True)
class Arguments:
    """The same as arguments of an op: mask ``[B|1, S|1, T|1]``, start and length int32 ``[B]``, causal."""

    mask: Node | None
    start: Node | None
    length: Node | None
    causal: bool


def understand(attention: Attention) -> Visibility:
    """What the queries of an attention op see.

    A mask that is added to the scores is understood when it is 0 in a range that is never empty and elsewhere so low
    that no score survives. Where a query may be left with such values only, their softmax is not zero, so the mask has
    to stay.
    """
    queries, tokens = attention.queries, attention.context
    bounds = (Bound(Affine(constant=1), True, True, attention.node),) if attention.causal else ()
    if attention.mask is None:
        return Visibility(queries, tokens, bounds)
    mask = mask_without_heads(attention.mask)
    if mask is None:
        raise ValueError("a mask that differs from head to head: such a site is to be refused before")
    if mask.meta["val"].dtype is torch.bool:
        parts = conjunction(mask)
        return Visibility(queries, tokens, (*bounds, *parts.bounds), parts.rest)
    condition = _condition(mask, trailing(mask.meta["val"].dim()))
    if condition is None or bounds or not _never_empty(condition):
        return Visibility(queries, tokens, bounds, additive=mask)
    return Visibility(queries, tokens, condition.bounds)


def _never_empty(condition: Conjunction) -> bool:
    """Whether bounds leave every query something: they all have one upper end, and the lower ends lie before it."""
    uppers, lowers = ([b for b in condition.bounds if b.upper is upper] for upper in (True, False))
    if condition.rest or len({b.diagonal for b in uppers}) != 1 or (lowers and len(uppers) > 1):
        return False
    if any(not b.value.terms and b.value.constant < 1 for b in uppers):
        return False
    gaps = [uppers[0].value.plus(b.value, -1) for b in lowers if b.diagonal is uppers[0].diagonal]
    return len(gaps) == len(lowers) and all(not gap.terms and gap.constant >= 1 for gap in gaps)


def _same_for_all_queries(mask: Node) -> bool:
    shape = shape_of(mask) or ()
    return len(shape) < 2 or shape[-2] == 1


def _condition(mask: Node, labels: Labels | None) -> Conjunction | None:
    """When an additive mask is 0 where something holds and out of reach elsewhere: what has to hold."""
    if mask.op != "call_function" or labels is None:
        return None
    if mask.target is aten.where.self:
        holds, yes, no = cast("tuple[Any, ...]", mask.args)
        labels = labels[len(labels) - len(shape_of(holds) or ()) :]
        if _scalar(yes) == 0 and _hides(no):
            return conjunction(holds, labels)
        return _negated(holds, labels) if _hides(yes) and _scalar(no) == 0 else None
    if mask.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        hidden: Any = mask.args[1]
        labels = labels[len(labels) - len(shape_of(hidden) or ()) :]
        return _negated(hidden, labels) if _scalar(mask.args[0]) == 0 and _hides(mask.args[2]) else None
    if mask.target is aten.triu.default and _hides(mask.args[0]) and labels[-2:] == ("S", "T"):
        offset = mask.args[1] if len(mask.args) > 1 else 0
        bound = Bound(Affine(constant=offset), True, True, mask) if isinstance(offset, int) else None
        return None if bound is None else Conjunction((bound,))
    inner = inner_labels(mask, labels)
    return None if inner is None else _condition(mask.args[0], inner)  # type: ignore[arg-type]


def _negated(condition: Node, labels: Labels) -> Conjunction | None:
    """What has to hold for a token to be seen that is hidden where ``condition`` holds."""
    bound = bound_of(condition, labels, condition, negated=True)
    return None if bound is None else Conjunction((bound,))


def _scalar(value: Any) -> float | None:
    """A number, or the one that fills a constant tensor."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Node):
        return None
    if value.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return 0.0
    if value.target in (aten.scalar_tensor.default, aten.full.default):
        return _scalar(value.args[0] if value.target is aten.scalar_tensor.default else value.args[1])
    if value.target in (aten.expand.default, aten._to_copy.default, aten.unsqueeze.default):
        return _scalar(value.args[0])
    return None


def _hides(value: Any) -> bool:
    number = _scalar(value)
    return number is not None and number <= MASKED


def emit_arguments(emit: Emitter, seen: Visibility, q: Node) -> Arguments:
    """Write down what the queries ``q [B, H, S, D]`` see."""
    batch, queries = emit.size(q, 0), emit.size(q, 2)
    diagonal, binding = seen.ends(upper=True, diagonal=True), seen.binding
    uppers = [b for b in binding if b.upper]
    masks = [*seen.masks, *(b.source for b in seen.ends(upper=False, diagonal=True))]
    if diagonal:
        masks += [b.source for b in uppers]  # where `length` ends, the diagonal does
        before_last = emit(operator.sub, queries, 1) if isinstance(queries, Node) else queries - 1
        ends = [] if _ends_with_the_tokens(diagonal, seen) else diagonal
        lengths = [emit_value(emit, b, before_last) for b in ends]
    else:
        lengths = [emit_value(emit, b) for b in uppers]
    lowers = [b for b in binding if not b.upper] + seen.ends(upper=False, diagonal=True)
    return Arguments(
        emit_mask(emit, masks, seen.additive),
        emit_rows(emit, [emit_value(emit, b) for b in lowers], batch, upper=False),
        emit_rows(emit, lengths, batch, upper=True),
        bool(diagonal),
    )


def _ends_with_the_tokens(ends: list[Bound], seen: Visibility) -> bool:
    """Whether the last query is known to see the last token, and no further: then no length has to be said."""
    values = [static_value(b.value) for b in ends]
    return len(values) == 1 and values[0] is not None and values[0] + seen.queries - 1 == seen.tokens


def emit_mask(emit: Emitter, masks: list[Node], additive: Node | None) -> Node | None:
    """Masks without heads as one ``[B|1, S|1, T|1]``."""
    joined: Node | None = None
    for mask in [*masks, *([] if additive is None else [additive])]:
        plain = _three_dimensional(emit, mask)
        joined = plain if joined is None else emit(aten.logical_and.default, joined, plain)
    return joined


def _three_dimensional(emit: Emitter, mask: Node) -> Node:
    if mask.meta["val"].dim() == 4:
        return emit(aten.squeeze.dim, mask, 1)
    while mask.meta["val"].dim() < 3:
        mask = emit(aten.unsqueeze.default, mask, 0)
    return mask
