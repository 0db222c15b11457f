"""Hand a graph to Inductor, or run it as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mlacompile.lowering.cudagraphs import cudagraph_patches, uses_cuda
from mlacompile.lowering.select import decode_nodes, shorten_calls
from mlacompile.options import Options

Compiled = Callable[..., Any]


def compile_rest(gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None) -> Compiled:
    """Compile a Dynamo or ATen graph for its example inputs, as ``options.rest`` says."""
    if options.rest == "eager":
        return gm.forward  # type: ignore[return-value]
    from torch._inductor.compile_fx import compile_fx

    patches = _patches(gm, example_inputs, options, mode)
    shorten_calls(gm)
    return compile_fx(gm, list(example_inputs), config_patches=patches)  # type: ignore[return-value]


def _patches(gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None) -> dict[str, Any]:
    known = torch._inductor.list_mode_options(mode) if mode not in (None, "default") else {}
    return known | _shared_launches(gm, example_inputs) | cudagraph_patches(gm, example_inputs, options, mode)


def _shared_launches(gm: GraphModule, example_inputs: Sequence[Any]) -> dict[str, Any]:
    """Let small kernels of a decode step share a launch, where this PyTorch can keep sums out of it.

    The cache of every layer counts its own tokens, and each count would be a launch. A norm that is put together with
    other kernels has their blocks, and takes four times as long (docs/kernels.md).
    """
    pointwise_alone = "combo_kernels_pointwise_only"
    if not uses_cuda(example_inputs) or not decode_nodes(gm) or not hasattr(torch._inductor.config, pointwise_alone):
        return {}
    return {"combo_kernels": True, pointwise_alone: True}
