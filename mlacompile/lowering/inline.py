"""Ops that no kernel serves are replaced by their reference bodies, so that Inductor can fuse them with what is around.

An op that stays an op runs its body step by step, each step through memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mlacompile.ops.fp8_quantize import fp8_dequantize_reference, fp8_quantize_reference

_BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.mlacompile.fp8_quantize.default: fp8_quantize_reference,
    torch.ops.mlacompile.fp8_dequantize.default: fp8_dequantize_reference,
}


def inline_references(gm: GraphModule) -> None:
    """Put the reference bodies of FP8 ops in their places, where the device can compile casts to FP8."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _BODIES and compiles_fp8(node.args[0]):  # type: ignore[arg-type]
            node.target = _BODIES[node.target]
    gm.recompile()


def compiles_fp8(x: Node) -> bool:
    """Whether Inductor can, where x lives: Triton casts to e4m3 from compute capability 8.9 on; PyTorch, which runs an
    op that is left alone, everywhere."""
    device = x.meta["val"].device
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
