"""The root of a norm becomes a factor behind the FP8 product of the rows that it was to divide.

    q, s = quantize_rows(x, norm = w)      →   q, s, squares = quantize_rows(x, norm = w, squares = True)
    fp8_linear(q, s, …)                    →   mlacompile::fp8_normed(q, s, squares, …), and so for fp8_stacked

One program has to see all of a row to divide it by its root, and reads a long row at the speed of one SM. Without the
root a row is cut into stretches.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mlacompile.ops.fp8_normed
import mlacompile.ops.fp8_stacked  # noqa: F401  (both register an op)
from mlacompile.kernels import registry
from mlacompile.ops.quantize_rows import STRETCH
from mlacompile.passes.emit import Emitter

_QUANTIZE_ROWS = torch.ops.mlacompile.quantize_rows.default
_FP8_NORMED = torch.ops.mlacompile.fp8_normed.default
_FP8_LINEAR = torch.ops.mlacompile.fp8_linear.default
_FP8_STACKED = torch.ops.mlacompile.fp8_stacked.default


def norms_behind_products(gm: GraphModule) -> int:
    """Write such calls into a functional ATen graph, where kernels take them; returns how many."""
    return sum(_moved(node) for node in gm.graph.find_nodes(op="call_function", target=_QUANTIZE_ROWS))


def _moved(rows: Node) -> bool:
    """Move the root of one norm, if kernels take rows without it and the product with it."""
    x, added, norm, *_ = (*rows.args, None, None)
    product = _only_product(rows)
    if norm is None or product is None or rows.meta["val"][0].shape[1] <= STRETCH:
        return False
    q, descale, weights, descales, dtype = product.args
    if product.target is _FP8_LINEAR:
        weights, descales = [weights], [descales]
    settings: dict[str, Any] = {"eps": 0.0, "gate": "", **rows.kwargs, "squares": True}
    settings.pop("impl", None)
    values: Any = torch.fx.map_arg((x, added, norm, None), lambda n: n.meta["val"])
    stretches, _ = registry.best("quantize_rows", *values, **settings)
    if stretches is None:
        return False
    emit, eps = Emitter(rows), settings["eps"]
    made = emit(_QUANTIZE_ROWS, x, added, norm, None, **settings, impl=stretches.name)
    squares = emit(operator.getitem, made, len(made.meta["val"]) - 1)
    arguments = (q, descale, squares, weights, descales, dtype)
    values = torch.fx.map_arg(arguments, lambda n: n.meta["val"])
    kernel, _ = registry.best("fp8_normed", *values, eps=eps)
    if kernel is None or kernel.slower(*values, eps=eps):
        return False  # nobody uses what was written
    rows.replace_all_uses_with(made)  # what it returns beside is the last
    rows.graph.erase_node(rows)
    normed = Emitter(product)(_FP8_NORMED, *arguments, eps=eps, impl=kernel.name)
    product.replace_all_uses_with(normed)
    product.graph.erase_node(product)
    return True


def _only_product(rows: Node) -> Node | None:
    """The FP8 product that is all that wants quantized rows and their scales."""
    parts = {user.args[1]: user for user in rows.users if user.target is operator.getitem}
    users = {user for i in (0, 1) if i in parts for user in parts[i].users}
    if len(parts) != len(rows.users) or len(users) != 1:
        return None
    (product,) = users
    if product.target not in (_FP8_LINEAR, _FP8_STACKED) or product.args[:2] != (parts.get(0), parts.get(1)):
        return None
    heads = product.target is _FP8_LINEAR and product.args[2].meta["val"].dim() != 2  # type: ignore[union-attr]
    return None if heads else product
