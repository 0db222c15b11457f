"""Experts in FP8: where a kernel takes them, the op that a CUDA graph can replay.

fp8_experts(x, …)   →   mlacompile::fp8_experts_placed(x, …, impl="triton")
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

import mlacompile.ops.fp8_experts  # noqa: F401  (registers the ops)
from mlacompile.kernels import registry

_EXPERTS = torch.ops.mlacompile.fp8_experts.default
_PLACED = torch.ops.mlacompile.fp8_experts_placed.default


def place_experts(gm: GraphModule) -> int:
    """Name the kernels of such products in a functional ATen graph, and return how many have one."""
    placed = 0
    for node in gm.graph.find_nodes(op="call_function", target=_EXPERTS):
        if node.kwargs.get("impl", "auto") != "auto":
            continue
        values: Any = torch.fx.map_arg(node.args, lambda n: n.meta["val"])
        kernel, _ = registry.best("fp8_experts", *values)
        if kernel is not None:
            node.target, node.kwargs = _PLACED, {"impl": kernel.name}
            placed += 1
    return placed
