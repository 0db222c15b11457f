"""CUDA graphs: the whole decode step replayed, cache mutation included.

Inductor's CUDA graph trees record the step. They allow a mutated input when its address is static, which is what
``mark_static_address`` of a static cache says; the functional stage keeps these marks. A graph whose sizes are symbolic
is recorded once for each size that it meets, if the sizes are those of such a cache: with others, of a cache that grows
or a prompt, every step would be a recording of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mlacompile.options import Options

_WITHOUT = ("max-autotune-no-cudagraphs",)


def uses_cuda(example_inputs: Sequence[Any]) -> bool:
    """Whether any input lies on a CUDA device."""
    return any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in example_inputs)


def varies(gm: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether calls of a graph may differ in size without end: every size would be a recording of its own.

    Sizes of inputs whose address is static do not: such an input is a cache that the caller keeps, and has one size.
    """
    symbols: set[Any] = set()
    fixed: set[Any] = set()
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        symbols |= _symbols(value)
        if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):
            fixed |= _symbols(value)
    return not symbols <= fixed


def _symbols(value: Any) -> set[Any]:
    """The symbols in a size, or in those of a tensor."""
    if isinstance(value, torch.Tensor):
        return set().union(*map(_symbols, value.shape))
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt) else set()


def replayable(gm: GraphModule) -> bool:
    """Whether no op of a graph looks at data on the host, as a prefill does to learn how much of a cache is written.

    Inductor could record around such an op, but a prompt takes far longer than its launches, and every recording keeps
    its memory.
    """
    unsafe = torch.Tag.cudagraph_unsafe
    return not any(unsafe in getattr(n.target, "tags", ()) for n in gm.graph.nodes if n.op == "call_function")


def cudagraph_patches(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None
) -> dict[str, Any]:
    """Inductor settings for the ``cudagraphs`` option; automatic means: on CUDA, unless the mode says no."""
    wanted = options.cudagraphs
    if wanted is None:
        wanted = uses_cuda(example_inputs) and mode not in _WITHOUT
    return {"triton.cudagraphs": wanted and not varies(gm, example_inputs) and replayable(gm)}


def forget_recordings() -> None:
    """Drop all recorded graphs and their memory. ``torch._dynamo.reset()`` does so itself since torch 2.13, before that
    for Inductor's own backend alone."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()
