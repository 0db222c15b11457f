"""Which stretch of another value a node of a graph is: a slice of it, or a part of a split."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


def stretch_of(part: Node) -> tuple[Node, int, int] | None:
    """What a node is a stretch of, along which dimension, and where it begins there; None for anything else, and for
    what begins where only a run can say."""
    args: list[Any] = list(part.args)
    if part.target is aten.slice.Tensor:
        whole, dim, begin, _end, step = args + [0, None, None, 1][len(args) - 1 :]
        size = whole.meta["val"].shape[dim]
        begin = 0 if begin is None else begin
        if step != 1 or not isinstance(begin, int) or (begin < 0 and not isinstance(size, int)):
            return None
        return whole, _axis(whole, dim), begin if begin >= 0 else max(begin + size, 0)
    if part.target is operator.getitem and args[0].target is aten.split_with_sizes.default:
        whole, sizes, dim = [*args[0].args, 0][:3]
        before = sizes[: args[1]]
        return (whole, _axis(whole, dim), sum(before)) if all(isinstance(size, int) for size in before) else None
    return None


def _axis(node: Node, dim: int) -> int:
    return int(dim % node.meta["val"].dim())
