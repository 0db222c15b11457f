"""What takes long to compute is stored before it is spread over many: rotary tables, above all.

    q [B, H, S, P] · cos(angles [B, 1, S, P])      Inductor fuses it all, and computes the cosine anew for every head

A sine takes dozens of instructions: a pointwise kernel that repeats it for 128 heads is bound by them, not by memory.
Stored, it is also computed once for all layers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mlacompile.ops.stored  # noqa: F401  (registers the op)
from mlacompile.passes.emit import Emitter
from mlacompile.passes.pull import RESHAPES

aten = torch.ops.aten

_SLOW = {aten.cos.default, aten.sin.default, aten.tan.default}
_VIEWS = RESHAPES | {
    *(aten.expand.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.slice.Tensor, aten.select.int, aten.alias.default),
}
_MOVES = _VIEWS | {aten.clone.default, aten._to_copy.default, aten.cat.default, aten.stack.default, aten.copy.default}
#: Values fewer than this are computed in no time, and a kernel of their own would only add its launch.
SPREAD_OVER = 1 << 20
_GROWS = 4


def store_before_spreading(gm: GraphModule) -> int:
    """Let such values be written to memory before they are broadcast; returns how many."""
    slow: set[Node] = set()
    bases: dict[Node, None] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if node.target in _SLOW:
            slow.add(node)
            continue
        if not _is_pointwise(node):
            continue
        behind = [a for a in node.all_input_nodes if a in slow]
        spread = [a for a in behind if _is_spread(a, node)]
        bases |= dict.fromkeys(map(_base, spread))
        if len(spread) < len(behind):
            slow.add(node)
    for base in bases:
        users = list(base.users)
        stored = Emitter(base.next)(torch.ops.mlacompile.stored.default, base)
        for user in users:
            user.replace_input_with(base, stored)
    if bases:
        _teach_inductor()
    return len(bases)


@cache
def _teach_inductor() -> None:
    """That the op is no kernel: its operand is written by the kernel that computes it, and read from there."""
    from torch._inductor.lowering import register_lowering

    @register_lowering(torch.ops.mlacompile.stored.default, type_promotion_kind=None)  # type: ignore[untyped-decorator]
    def lower_stored(x: Any) -> Any:
        x.realize()
        return x


def _is_pointwise(node: Node) -> bool:
    return node.target in _MOVES or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_spread(small: Node, large: Node) -> bool:
    """Whether many values are made of few, as far as sizes are known."""
    few, many = (elements(n.meta["val"]) for n in (small, large))
    return many >= SPREAD_OVER and many >= _GROWS * few


def elements(x: torch.Tensor) -> int:
    """Of a symbolic size as it was when the graph was traced."""
    total = 1
    for size in x.shape:
        total *= int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)
    return total


def _base(node: Node) -> Node:
    """What a view is one of."""
    source: Any = node
    while source.target in _VIEWS:
        source = source.args[0]
    return source  # type: ignore[no-any-return]
