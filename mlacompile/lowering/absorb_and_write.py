"""The absorbed product of a decode step's queries, and what is written of its token, become one launch.

    fp8_linear(q_nope, None, w_uk, …)   ┐
    write_latents(…, q_pe, …)           ├─►  mlacompile::absorb_and_write, before attention reads either
    mla_decode(q_latent, q_pe, …)       ┘

Where the product of every head is in FP8, so that a kernel of ours makes it, and the one that is chosen has tiles.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import mlacompile.ops.absorb_and_write  # noqa: F401  (registers the op)
from mlacompile.kernels import registry
from mlacompile.lowering.region import MOVES
from mlacompile.lowering.select import decode_nodes
from mlacompile.passes.emit import Emitter

_ABSORB_AND_WRITE = torch.ops.mlacompile.absorb_and_write.default
_FP8_LINEAR = torch.ops.mlacompile.fp8_linear.default
_WRITE_LATENTS = torch.ops.mlacompile.write_latents.default


def absorb_and_write(gm: GraphModule) -> int:
    """Write such calls into a functional ATen graph, where a kernel takes them; returns how many."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    return sum(_join(decode, order) for decode in decode_nodes(gm))


def _join(decode: Node, order: dict[Node, int]) -> bool:
    product, write = (_made_by(query) for query in decode.args[:2])
    if product is None or product.target is not _FP8_LINEAR or write is None or write.target is not _WRITE_LATENTS:
        return False
    x, x_descale, weight, descale, dtype = product.args
    values: Any = map_arg(product.args, lambda n: n.meta["val"])
    if x_descale is not None or values[2].dim() != 3 or values[0].dtype != dtype:
        return False
    best, _ = registry.best("fp8_linear", *values)
    settings = {key: value for key, value in write.kwargs.items() if key != "impl"}
    arguments = (x, weight, descale, *write.args)
    values = map_arg(arguments, lambda n: n.meta["val"])
    kernel, _ = registry.best("absorb_and_write", *values, **settings)
    before = min((user for node in (product, write) for user in node.users), key=order.__getitem__)
    inputs = {*product.all_input_nodes, *write.all_input_nodes}
    late = any(order.get(node, len(order)) >= order[before] for node in inputs)
    if best is None or kernel is None or best.name != kernel.name or late:
        return False
    emit = Emitter(before)
    made = emit(_ABSORB_AND_WRITE, *arguments, **settings, impl=kernel.name)
    for i, node in enumerate((product, write)):
        node.replace_all_uses_with(emit(operator.getitem, made, i))
        node.graph.erase_node(node)
    return True


def _made_by(node: Any) -> Node | None:
    """What made the queries of a call; None for none."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in MOVES:
        node = node.args[0]
    return node if isinstance(node, Node) else None
