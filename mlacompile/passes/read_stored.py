"""Stage 5, the cache: attention reads what a cache in FP8 stores, and nobody writes out what it says.

    before   c_kv = fp8_dequantize(q, descale, group);  mla_decode(…, c_kv, k_pe, …)
    after    mla_decode(…, q, k_pe, …, descale=descale)

Dequantizing is then what a kernel does to a tile on its way in. Rotary keys in FP8 bring their factor as one more
column. A cache in groups that ``mla_decode`` does not know stays as it is, and so does one that no kernel reads where
it lies: dequantized, some kernel may take it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

import mlacompile.ops  # noqa: F401  (registers the ops that are looked for)
from mlacompile.geometry import SCALE_GROUP
from mlacompile.passes.axes import shape_of
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten
_DECODE = torch.ops.mlacompile.mla_decode.default
_DEQUANTIZE = torch.ops.mlacompile.fp8_dequantize.default
#: Arguments of ``mla_decode`` by position.
_C_KV, _K_PE, _BLOCK_TABLE, _DESCALE = 2, 3, 7, 8
_ALIKE = {aten.alias.default, aten.detach.default, aten.clone.default}


def read_stored(graph: Graph, read: Callable[..., bool] = lambda *args, **kwargs: True) -> int:
    """Rewrite every ``mla_decode`` over a dequantized cache; returns how many.

    read: called like the op, whether a kernel reads that cache.
    """
    return sum(_rewrite(node, read) for node in list(graph.find_nodes(op="call_function", target=_DECODE)))


def _rewrite(decode: Node, read: Callable[..., bool]) -> bool:
    args: list[Any] = [*decode.args, *[None] * (_DESCALE + 1 - len(decode.args))]
    latent = _Stored.behind(args[_C_KV])
    if latent is None or args[_DESCALE] is not None or not latent.known:
        return False
    emit = Emitter(decode)
    args[_C_KV], args[_DESCALE] = latent.moved(emit, latent.q), latent.moved(emit, latent.descale)
    rope = None if args[_K_PE] is None else _Stored.behind(args[_K_PE])
    if rope is not None and shape_of(rope.descale)[-1] == 1:  # type: ignore[index]
        factors = _beside(latent, rope)
        if factors is None:
            factors = emit(aten.cat.default, [args[_DESCALE], rope.moved(emit, rope.descale)], -1)
        else:
            factors = latent.moved(emit, factors)
        args[_K_PE], args[_DESCALE] = rope.moved(emit, rope.q), factors
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    settings = {name: value for name, value in decode.kwargs.items() if name != "impl"}
    if not read(*values, **settings):
        return False
    decode.args = tuple(args)
    return True


class _Stored:
    """A dequantization, and the ops between it and its user, none of which touches the last dimension."""

    def __init__(self, dequantize: Node, steps: list[Node]) -> None:
        self.q, self.descale, self.group = dequantize.args[:3]
        self.width = shape_of(dequantize)[-1]  # type: ignore[index]
        self.steps = steps

    q: Any
    descale: Any
    group: Any

    @classmethod
    def behind(cls, node: Node) -> _Stored | None:
        """What is dequantized to become this node, or None."""
        steps: list[Node] = []
        while node.target is not _DEQUANTIZE:
            if node.op != "call_function" or not _keeps_last(node):
                return None
            steps.append(node)
            node = node.args[0]  # type: ignore[assignment]
        return cls(node, steps[::-1])

    @property
    def known(self) -> bool:
        """Whether ``mla_decode`` knows these groups: one a token, or one for every ``SCALE_GROUP`` values."""
        return self.group == SCALE_GROUP or self.group >= self.width

    def moved(self, emit: Emitter, node: Node) -> Node:
        """The same steps on what is dequantized, or on its factors."""
        for step in self.steps:
            if step.target in _ALIKE:
                continue
            args: list[Any] = list(step.args[1:])
            if step.target in (aten.reshape.default, aten.view.default, aten.expand.default):
                args[0] = [*args[0][:-1], node.meta["val"].shape[-1]]
            node = emit(step.target, node, *args)
        return node


def _keeps_last(node: Node) -> bool:
    """Whether an op gives every row of the last dimension another place at most."""
    if node.target in _ALIKE:
        return True
    if not node.args or not isinstance(node.args[0], Node):
        return False  # joined from several
    before, after = shape_of(node.args[0]), shape_of(node)
    if before is None or after is None or len(before) < 2 or len(after) < 2:
        return False
    last = len(before) - 1
    argument: Any = node.args[1] if len(node.args) > 1 else None
    if node.target in (aten.slice.Tensor, aten.squeeze.dim):
        return argument not in (None, last, -1)
    if node.target is aten.unsqueeze.default:
        return argument not in (len(before), -1)
    if node.target is aten.permute.default:
        return argument[-1] in (last, -1)
    if node.target in (aten.reshape.default, aten.view.default, aten.expand.default):
        return isinstance(before[-1], int) and before[-1] == after[-1] and before[-1] > 1
    return False


def _beside(latent: _Stored, rope: _Stored) -> Node | None:
    """The tensor whose columns are the factors of both, one after the other, or None."""
    cuts: list[list[Any]] = [
        list(node.args) for node in (latent.descale, rope.descale) if node.target is aten.slice.Tensor
    ]
    if [len(cut) for cut in cuts] != [4, 4]:
        return None
    (whole, dim, first, middle), (same, dim_too, begin, end) = cuts
    shape = shape_of(whole)
    if whole is not same or shape is None or not {dim, dim_too} <= {len(shape) - 1, -1}:
        return None
    return whole if first == 0 and middle == begin and end >= shape[-1] else None
