"""Masks whose every value is known while compiling, because nothing but sizes goes into them.

    position = arange(S); packed = (diff(position) != 1).cumsum(-1)
    mask = (packed[s] == packed[t]) & (position[t] <= position[s])        →   t < s + 1

How such a mask was spelled does not matter: it is computed once, on the CPU, and held against the bands that a kernel
knows. Sizes have to be numbers for that; a graph with symbolic ones keeps its mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_arg

#: Elements of the largest tensor that is computed for this; a longer mask stays a mask.
LARGEST = 1 << 29
_META = "mlacompile_band"


@dataclass(frozen=True)
class Band:
    """Query s sees first + s <= t < end + s. None: that side hides nothing."""

    first: int | None
    end: int | None


def known_band(mask: Node) -> Band | None:
    """The band that a boolean mask ``[…, S, T]`` is, the same for all rows of a batch; None when it is none, or not
    known."""
    if _META not in mask.meta:
        with unset_fake_temporarily(), torch.no_grad():
            value = _value(mask)
            mask.meta[_META] = None if value is None or value.dim() < 2 else _band(value)
    found: Band | None = mask.meta[_META]
    return found


def _band(mask: torch.Tensor) -> Band | None:
    rows = mask.reshape(-1, *mask.shape[-2:])
    if not bool((rows == rows[:1]).all()):
        return None
    seen = rows[0]
    if bool(seen.all()):
        return Band(None, None)
    queries, tokens = seen.shape
    if not bool(seen.any(1).all()):
        return None  # a query that sees nothing is no band's
    s, t = torch.arange(queries).unsqueeze(1), torch.arange(tokens)
    end: int | None = tokens - int(seen[0].flip(0).int().argmax())
    first: int | None = int(seen[-1].int().argmax()) - (queries - 1)
    if bool(seen[0, -1]):
        end = None
    if bool(seen[-1, 0]):
        first = None
    expected = torch.ones_like(seen)
    if end is not None:
        expected &= t < s + end
    if first is not None:
        expected &= t >= s + first
    return Band(first, end) if torch.equal(expected, seen) else None


def _value(node: Node) -> torch.Tensor | None:
    """The value of a node that depends on nothing, computed on the CPU; None for any other."""
    order: list[Node] = []
    if not _collect(node, order, set()):
        return None
    env: dict[Node, Any] = {}
    for each in order:
        given = {k: v for k, v in each.kwargs.items() if k != "pin_memory"}
        args, kwargs = map_arg(each.args, env.__getitem__), dict(map_arg(given, env.__getitem__))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        env[each] = each.target(*args, **kwargs)  # type: ignore[operator]
    value: torch.Tensor = env[node]
    return value


def _collect(node: Node, order: list[Node], seen: set[Node]) -> bool:
    """List what a node is computed from, first things first; False when some of it is not known while compiling."""
    if node in seen:
        return True
    seen.add(node)
    if not _computable(node):
        return False
    if not all(_collect(source, order, seen) for source in node.all_input_nodes):
        return False
    order.append(node)
    return True


def _computable(node: Node) -> bool:
    target, held = node.target, node.meta.get("val")
    if (
        node.op != "call_function"
        or not isinstance(target, torch._ops.OpOverload)
        or not isinstance(held, torch.Tensor)
    ):
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    sizes = [*held.shape, *(a for a in _flat(node.args) if isinstance(a, torch.SymInt))]
    return all(isinstance(s, int) for s in sizes) and math.prod(held.shape) <= LARGEST


def _flat(args: Any) -> list[Any]:
    return [b for a in args for b in _flat(a)] if isinstance(args, (list, tuple)) else [args]
