"""Products of heads, and the rows in FP8 that are made of them, become one launch.

    heads = fp8_linear(latents, None, w_uv, …)     ┐
    rows  = quantize_rows(heads, as they lie)      ┘─►  mlacompile::heads_quantized(latents, w_uv, …)

Where nothing else wants the heads, and each is a group of values that share a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import mlacompile.ops.heads_quantized  # noqa: F401  (registers the op)
from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels import registry
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten
_QUANTIZE_ROWS = torch.ops.mlacompile.quantize_rows.default
_FP8_LINEAR = torch.ops.mlacompile.fp8_linear.default
_HEADS_QUANTIZED = torch.ops.mlacompile.heads_quantized.default


def quantize_heads(gm: GraphModule) -> int:
    """Write such calls into a functional ATen graph, where a kernel takes them; returns how many."""
    return sum(_join(rows) for rows in gm.graph.find_nodes(op="call_function", target=_QUANTIZE_ROWS))


def _join(rows: Node) -> bool:
    heads: Any = rows.args[0]
    if any(argument is not None for argument in rows.args[1:]) or heads.target is not aten.permute.default:
        return False
    product, order = heads.args
    if list(order) != [1, 0, 2] or product.target is not _FP8_LINEAR or len(heads.users) + len(product.users) > 2:
        return False
    x, x_descale, weight, descale, dtype = product.args
    values: Any = map_arg((x, weight, descale), lambda n: n.meta["val"])
    if x_descale is not None or values[1].dim() != 3 or values[1].shape[1] != SCALE_GROUP or values[0].dtype != dtype:
        return False
    kernel, _ = registry.best("heads_quantized", *values)
    if kernel is None or kernel.slower(*values):
        return False
    rows.replace_all_uses_with(Emitter(rows)(_HEADS_QUANTIZED, x, weight, descale, impl=kernel.name))
    rows.graph.erase_node(rows)
    return True
