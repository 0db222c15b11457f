"""FP8 products of the same few rows: two of them become one launch.

    fp8_linear(x, s, w₀, …), fp8_linear(x, s, w₁, …)   →   mlacompile::fp8_stacked(x, s, [w₀, w₁], …), in two parts

Weights that were in FP8 before the graph was made are those of a checkpoint and stay where they are; those that
``passes/quantize.py`` puts in FP8 are one weight from the beginning.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mlacompile.ops.fp8_stacked  # noqa: F401  (registers the op)
from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels import registry
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten
_FP8_LINEAR = torch.ops.mlacompile.fp8_linear.default
_FP8_STACKED = torch.ops.mlacompile.fp8_stacked.default
_VIEWS = {
    aten.reshape.default, aten.slice.Tensor, aten.split_with_sizes.default, aten.permute.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, operator.getitem,
}  # fmt: skip


def stack_products(gm: GraphModule) -> int:
    """Write such pairs into a functional ATen graph, where a kernel takes them; returns how many."""
    waiting: dict[tuple[Any, ...], Node] = {}
    stacked = 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.find_nodes(op="call_function", target=_FP8_LINEAR):
        key = (*map(_what, node.args[:2]), node.args[4])
        first = waiting.pop(key, None)
        if first is None:
            waiting[key] = node
        elif all(order[n] < order[first] for n in node.args[2:4]):  # type: ignore[index]
            stacked += _stack(first, node)
    return stacked


def _what(node: Any) -> Any:
    """What a value is: equal for equal parts of equal calls, which a model makes before each of its layers in FP8."""
    if not isinstance(node, Node) or node.target is not operator.getitem:
        return node
    call: Any = node.args[0]
    return call.target, tuple(call.args), tuple(call.kwargs.items()), node.args[1]


def _stack(first: Node, second: Node) -> bool:
    """Make both one launch where the first of them is, if a kernel takes them."""
    pair = sorted((first, second), key=lambda node: _shape(node.args[2])[0] % SCALE_GROUP)  # the last may end anywhere
    x, x_descale, dtype = first.args[0], first.args[1], first.args[4]
    weights, descales = [node.args[2] for node in pair], [node.args[3] for node in pair]
    if any(len(_shape(w)) != 2 for w in weights) or _shape(weights[0])[0] % SCALE_GROUP:
        return False
    if not all(isinstance(size, int) for size in _shape(x)):
        return False
    values: Any = torch.fx.map_arg((x, x_descale, weights, descales, dtype), lambda n: n.meta["val"])
    kernel, _ = registry.best("fp8_stacked", *values)
    if kernel is None or kernel.slower(*values):
        return False
    emit = Emitter(first)
    made = emit(_FP8_STACKED, x, x_descale, weights, descales, dtype, impl=kernel.name)
    rows = _shape(pair[0])[1]
    parts = [emit(aten.slice.Tensor, made, 1, begin, begin + _shape(n)[1]) for begin, n in zip((0, rows), pair)]
    for node, part in zip(pair, parts, strict=True):
        node.replace_all_uses_with(part)
        emit.graph.erase_node(node)
        reshape_anew(part, emit)
    return True


def reshape_anew(node: Node, emit: Emitter) -> None:
    """Trace what only views ``node`` again: it was traced on contiguous rows, which now lie further apart."""
    for user in list(node.users):
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        if user.target in _VIEWS:
            args, kwargs = torch.fx.map_arg((user.args, user.kwargs), lambda n: n.meta["val"])
            with emit.mode:
                user.meta["val"] = user.target(*args, **kwargs)  # type: ignore[operator]
            reshape_anew(user, emit)


def _shape(node: Any) -> Any:
    return node.meta["val"].shape
