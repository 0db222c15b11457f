"""What of a cache the queries see is computed once, not once a layer.

Every layer of a step asks for the same few integers, each time written out anew; to Inductor these are as many kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from mlacompile.lowering.select import decode_nodes

#: The arguments ``start`` and ``length`` of ``mla_decode``.
_BOUNDS = (5, 6)
#: Ops behind such an argument; what is longer is no such thing.
_MOST_STEPS = 32


def share_bounds(gm: GraphModule) -> int:
    """Let decoding attentions whose bounds are the same ops on the same values share them; returns how many do."""
    known: dict[str, Node] = {}
    shared = 0
    for decode in decode_nodes(gm):
        for i in _BOUNDS:
            bound: Any = decode.args[i] if len(decode.args) > i else None
            name = None if not isinstance(bound, Node) else _spelled(bound, {})
            if name is None:
                continue
            first = known.setdefault(name, bound)
            if first is not bound:
                decode.args = (*decode.args[:i], first, *decode.args[i + 1 :])
                shared += 1
    return shared


def _spelled(node: Node, known: dict[Node, str]) -> str | None:
    """The ops that make a node, down to inputs and what is not a plain function; None if they are many."""
    if node not in known:
        if len(known) >= _MOST_STEPS:
            return None
        known[node] = node.name
        if _is_plain(node):
            parts = [_spelled(source, known) for source in node.all_input_nodes]
            if None in parts:
                return None
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Spelled(known[n]))
            known[node] = f"{node.target}{args}{kwargs}"
    return known[node]


def _is_plain(node: Node) -> bool:
    """Whether an op gives the same for the same, whenever it runs."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


class _Spelled(str):
    """A text that stands in a printed tuple without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
