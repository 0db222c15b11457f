"""Where in the user's own files a node comes from."""

from __future__ import annotations

import re

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def source_of(node: Node) -> str:
    """``file:line`` of the innermost ``forward`` that made this node (any frame when there is none), or ``unknown``."""
    frames = [m.groupdict() for m in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    if not frames:
        return "unknown"
    forwards = [f for f in frames if f["function"] == "forward"]
    frame = forwards[-1] if forwards else frames[-1]
    return f"{frame['file']}:{frame['line']}"


def behind_graph_break(node: Node) -> bool:
    """Whether Dynamo had to start a new graph between the beginning of the user's function and this node."""
    return "torch_dynamo_resume_in" in (node.meta.get("stack_trace") or "")


GRAPH_BREAK = (
    "a graph break lies in between; TORCH_LOGS=graph_breaks says where, and "
    "torch._dynamo.config.capture_dynamic_output_shape_ops or capture_scalar_outputs may heal it"
)


def describe(node: Node) -> str:
    """A node for a reader: what it is, and where it stands in the source."""
    if node.op == "placeholder":
        return "an input of the graph"
    return f"{op_name(node)} at {source_of(node)}"


def op_name(node: Node) -> str:
    """What a node calls, without overload; with its namespace when that is not ATen."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
