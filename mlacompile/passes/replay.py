"""Run a cone again at any size: on tensors, to learn what it computes or to compare it, or into a graph.

Shapes come from the axes that the walk found, not from the arguments the graph was traced with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from mlacompile.passes.axes import CONSTANT, Dims, shape_with
from mlacompile.passes.cone import Cone
from mlacompile.passes.pull import LINEAR, REARRANGE

aten = torch.ops.aten


def evaluate(cone: Cone, feeds: dict[Node, torch.Tensor], batch: int, tokens: int) -> dict[Node, torch.Tensor]:
    """Run the cone in float64 at ``batch`` sentences of ``tokens`` tokens, with ``feeds`` for latents and weights."""
    return replay(cone, feeds, batch, tokens, _call)


def replay(
    cone: Cone, feeds: dict[Node, Any], batch: int, tokens: int, call: Callable[..., Any], casts: bool = False
) -> dict[Node, Any]:
    """Run a cone again at other sizes. Values are tensors, or nodes where ``call`` writes into a graph.

    Args:
        call: ``call(op, *args, **kwargs)``.
        casts: keep dtypes; else everything has that of the feeds.
    """
    env = dict(feeds)
    for node in cone.order:
        if node not in env:
            env[node] = _run(node, env, cone.dims[node], batch, tokens, call, casts)
    return env


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


def _run(
    node: Node, env: dict[Node, Any], dims: Dims, batch: int, tokens: int, call: Callable[..., Any], casts: bool
) -> Any:
    """One node at stand-in sizes: shapes come from the axes, not from the arguments the graph was traced with."""
    shape = [int(s) for s in shape_with(dims, batch, tokens)]
    target = node.target
    if target in CONSTANT:
        fill = 0.0 if "zeros" in str(target) else float("nan")
        value = node.meta["val"]
        dtype, device = (value.dtype, value.device) if casts else (torch.float64, "cpu")  # where the feeds are
        return call(aten.full.default, shape, fill, dtype=dtype, device=device)
    args = [_value(a, env) for a in node.args]
    if REARRANGE.get(target) is LINEAR[aten.view.default]:  # type: ignore[arg-type]
        return call(aten.reshape.default, args[0], shape)
    if target is aten.expand.default:
        return call(aten.expand.default, args[0], shape)
    if target is aten.repeat.default:
        return _repeat_to(args[0], shape, call)
    if target is aten._to_copy.default and not casts:
        return args[0]
    if target is aten.copy.default:
        return call(aten.expand.default, args[1], shape)
    if target is operator.getitem:
        return _part_of_split(node, env, call)
    if target in (aten.slice.Tensor, aten.slice_scatter.default):
        whole = args[0] if target is aten.slice.Tensor else args[1]
        if list(_shape(whole)) == shape:
            return whole
    return call(target, *args, **node.kwargs)


def _shape(value: Any) -> Any:
    return value.meta["val"].shape if isinstance(value, Node) else value.shape


def _value(arg: Any, env: dict[Node, Any]) -> Any:
    if isinstance(arg, Node):
        if arg not in env:
            return None  # an operand the axes do not need, such as the base a full slice_scatter overwrites
        return env[arg]
    if isinstance(arg, (list, tuple)):
        return [_value(a, env) for a in arg]
    return arg


def _repeat_to(x: Any, shape: list[int], call: Callable[..., Any]) -> Any:
    padded = [1] * (len(shape) - len(_shape(x))) + [int(s) for s in _shape(x)]
    view = call(aten.reshape.default, x, padded)
    return call(aten.repeat.default, view, [s // p for s, p in zip(shape, padded, strict=True)])


def _part_of_split(node: Node, env: dict[Node, Any], call: Callable[..., Any]) -> Any:
    split: Any = node.args[0]
    index = node.args[1]
    source = env[split.args[0]]
    if split.target is aten.unbind.int:
        return call(aten.select.int, source, split.args[1] if len(split.args) > 1 else 0, index)
    return call(operator.getitem, call(split.target, source, *split.args[1:], **split.kwargs), index)
