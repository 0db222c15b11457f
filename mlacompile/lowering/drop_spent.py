"""What a step hands from kernel to kernel is not written to memory: who reads it last is told so, and drops it from L2.

    latents = mla_decode(…)                  …, 64 rows of 128 heads of 512 values: 8 MB
    heads = fp8_linear(latents, …)           …, 2 MB
    quantize_rows(heads)           →         quantize_rows(heads, done=latents, spent=True)
    fp8_linear(…)                            reads 117 MB of weights, under which L2 would write all that to memory

The calls that quantize rows do this, and those whose heads leave quantized: each stands before a product that reads a
large weight, and what it was made of is of no use behind it. Only what our own ops have made is dropped, which no other
value shares memory with, and only where every reader is the call itself or an op of ours that its rows depend on,
whatever order Inductor finds: its own kernels read wherever it has fused them to.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import mlacompile.ops.heads_quantized
import mlacompile.ops.quantize_rows  # noqa: F401  (both register an op)
from mlacompile.lowering.region import MOVES
from mlacompile.passes.hoist import behind

aten = torch.ops.aten
#: Ops that can drop: which of their arguments are spent, and which one is told what else is done; None for none.
_DROPS: dict[Any, tuple[tuple[int, ...], int | None]] = {
    torch.ops.mlacompile.quantize_rows.default: ((0, 3), 4),
    torch.ops.mlacompile.heads_quantized.default: ((0,), None),
}
#: Ops whose result is, or may be, the memory of their first argument.
_VIEWS = MOVES - {aten.clone.default, aten.contiguous.default, operator.getitem}
#: Bytes below which memory is spared less than it takes to drop them.
SMALLEST = 1 << 20


def drop_spent(gm: GraphModule) -> int:
    """Write what is dropped into the calls of a functional ATen graph; returns how many drop something."""
    calls = [call for op in _DROPS for call in gm.graph.find_nodes(op="call_function", target=op)]
    calls = [call for call in calls if call.kwargs.get("impl") not in (None, "auto", "reference")]
    if not calls:
        return 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    calls.sort(key=order.__getitem__)
    kept = {node: readers for node in _made_here(gm) if all(map(_is_ours, readers := _readers(node)))}
    return sum(_drop(call, kept, order) for call in calls)


def _drop(call: Node, kept: dict[Node, set[Node]], order: dict[Node, int]) -> bool:
    """Let a call drop what has been read by then, and take that from what is kept."""
    by_then = behind(call)
    of_spent, of_done = _DROPS[call.target]
    own = _memory(*(a for i, a in enumerate(call.args) if i in of_spent))
    others = _memory(*(a for i, a in enumerate(call.args) if i not in of_spent))
    spent = all(n in kept and kept[n] <= by_then for n in own) and sum(map(_size, own)) >= SMALLEST
    spent = spent and own.isdisjoint(others)  # of which a program may have other rows
    before = set() if of_done is None else by_then - {call}
    over = [n for n, readers in kept.items() if readers and readers <= before and _size(n) >= SMALLEST]
    done = max((n for n in over if n not in own), key=lambda n: max(map(order.__getitem__, kept[n])), default=None)
    for node in (*over, *(own if spent else ())):
        kept.pop(node, None)
    if not spent and done is None:
        return False
    if of_done is not None:
        call.args = (*call.args, *[None] * (of_done - len(call.args)), done)
    call.kwargs = {**call.kwargs, "spent": spent}
    return True


def _made_here(gm: GraphModule) -> Iterator[Node]:
    """Tensors that ops of ours have made, each in memory of its own, and no two by equal calls: of those a compiler
    makes one, with the readers of both."""
    seen: dict[Any, Node] = {}
    first: dict[Node, Node] = {}
    twice: set[Node] = set()
    for node in gm.graph.nodes:
        first[node] = node
        if node.op == "call_function":
            same = seen.setdefault(_spelled(node, first), node)
            first[node] = same
            twice |= {same, node} if same is not node else set()
    for node in gm.graph.nodes:
        call: Any = node.args[0] if node.target is operator.getitem else node
        if isinstance(call, Node) and _is_ours(call) and twice.isdisjoint((call, node)) and _is_whole(node):
            yield node


def _is_ours(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "mlacompile"


def _spelled(node: Node, first: dict[Node, Node]) -> str:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: first[n].name)
    return f"{node.target} {args} {sorted(kwargs.items())}"


def _is_whole(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
        return False
    return value.is_contiguous()


def _memory(*arguments: Any) -> set[Node]:
    """The nodes that made what arguments are, or are views of."""
    return {_memory_of(node) for node in arguments if node is not None}


def _memory_of(node: Node) -> Node:
    while node.op == "call_function" and (node.target in _VIEWS or _is_part(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_part(node: Node) -> bool:
    """Whether a node takes one view out of several; a part of what an op of ours returns has memory of its own."""
    return node.target is operator.getitem and node.args[0].target in _VIEWS  # type: ignore[union-attr]


def _readers(node: Node) -> set[Node]:
    """All that reads the memory of a node, through whatever views."""
    found: set[Node] = set()
    for user in node.users:
        is_view = user.op == "call_function" and (user.target in _VIEWS or _is_part(user))
        found |= _readers(user) if is_view else {user}
    return found


def _size(node: Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 0
