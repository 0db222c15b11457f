"""CUDA graphs: the whole decode step replayed, cache mutation included.

Inductor's CUDA graph trees record the step. They allow a mutated input when its address is static, which is what
``mark_static_address`` of a static cache says; the functional stage keeps these marks. Graphs with symbolic shapes
are not recorded: every length would be a recording of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mlacompile.options import Options

_WITHOUT = ("max-autotune-no-cudagraphs",)


def uses_cuda(example_inputs: Sequence[Any]) -> bool:
    """Whether any input lies on a CUDA device."""
    return any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in example_inputs)


def is_dynamic(example_inputs: Sequence[Any]) -> bool:
    """Whether any size is symbolic."""
    return any(
        isinstance(x, torch.SymInt)
        or (isinstance(x, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in x.shape))
        for x in example_inputs
    )


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
    return {"triton.cudagraphs": wanted and not is_dynamic(example_inputs) and replayable(gm)}
