"""Hand a graph to Inductor, or run it as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mlacompile.lowering.cudagraphs import cudagraph_patches
from mlacompile.lowering.select import shorten_calls
from mlacompile.options import Options

Compiled = Callable[..., Any]


def compile_rest(gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None) -> Compiled:
    """Compile a Dynamo or ATen graph for its example inputs, as ``options.rest`` says."""
    if options.rest == "eager":
        return gm.forward  # type: ignore[return-value]
    from torch._inductor.compile_fx import compile_fx

    shorten_calls(gm)
    return compile_fx(gm, list(example_inputs), config_patches=_patches(gm, example_inputs, options, mode))  # type: ignore[return-value]


def _patches(gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None) -> dict[str, Any]:
    known = torch._inductor.list_mode_options(mode) if mode not in (None, "default") else {}
    return known | cudagraph_patches(gm, example_inputs, options, mode)
