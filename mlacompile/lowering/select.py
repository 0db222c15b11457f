"""Which kernel computes an op: the first whose ``supports()`` has nothing to say against it.

Where none fits, an op's reference body takes its place in the graph and Inductor compiles that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mlacompile.kernels import registry
from mlacompile.ops import mla_decode_reference

_DECODE_ARGS = 9


def decode_nodes(gm: GraphModule) -> list[Node]:
    """All ``mla_decode`` calls of a graph."""
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.mla_decode.default))


def select(node: Node, wanted: str) -> tuple[str, list[str]]:
    """Name of the kernel for one ``mla_decode`` call, and why each better one was passed over.

    "inductor" stands for the reference body compiled in place.
    """
    values: list[Any] = [a.meta["val"] if isinstance(a, Node) else a for a in node.args[:_DECODE_ARGS]]
    device = values[0].device.type
    if device == "meta":
        return "chosen on the device", []
    if wanted == "reference":
        return "inductor", []
    settings: dict[str, Any] = {"scale": node.kwargs["scale"], "causal": node.kwargs.get("causal", False)}
    if wanted != "auto":
        reasons = registry.find("mla_decode", wanted).supports(*values, **settings)
        return ("inductor", [f"{wanted}: {'; '.join(reasons)}"]) if reasons else (wanted, [])
    best, passed = registry.best("mla_decode", *values, **settings)
    # On a CPU, that a GPU kernel needs a GPU is no news.
    lines = [f"{name}: {'; '.join(reasons)}" for name, reasons in passed.items() if device != "cpu"]
    return ("inductor" if best is None else best.name), lines


def slower_in_fp8(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why ``x @ weight.T`` would not be faster in FP8 here, or None."""
    passed = [reason for kernel in registry.kernels("fp8_linear") for reason in kernel.supports(x, weight)]
    if passed or not registry.kernels("fp8_linear"):
        return passed[0] if passed else f"no kernel makes FP8 products faster on {x.device.type}"
    return None


def place_kernels(gm: GraphModule, chosen: dict[Node, str]) -> None:
    """Write the choice into the graph: a kernel's name, or the reference body in place of the op."""
    for node, name in chosen.items():
        kwargs = dict(node.kwargs)
        kwargs.pop("impl", None)
        if name == "inductor":
            node.target = mla_decode_reference
        elif name in {k.name for k in registry.kernels("mla_decode")}:
            kwargs["impl"] = name
        node.kwargs = kwargs
    gm.recompile()
