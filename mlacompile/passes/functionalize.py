"""Stage 2: views and mutations become dataflow.

AOTAutograd traces the Dynamo graph into functional ATen ops: a key assembled by slice assignment becomes
``slice_scatter``, a cache
write becomes ``index_copy`` with one ``copy_`` into the input at the very end. No decompositions are applied, so
that attention, softmax and casts stay readable; Inductor applies its own afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.utils import detect_fake_mode
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

Compiled = Callable[..., Any]
Stage = Callable[[GraphModule, Sequence[Any]], Compiled]


def functionalize(gm: GraphModule, example_inputs: Sequence[Any], then: Stage) -> Compiled:
    """Trace ``gm`` into a functional graph, hand it and its fake inputs to ``then``, and return what runs in place
    of ``gm``.

    Inputs are what Dynamo passes to a backend. Exceptions raised by ``then`` reach the caller.
    """
    direct: list[Compiled] = []

    def compile_functional(graph: GraphModule, inputs: Sequence[Any]) -> Compiled:
        context = TracingContext.try_get()
        plain = context is not None and _is_plain(context.fw_metadata, gm, graph)  # before inputs are added to it
        compiled = then(graph, inputs)
        if plain:
            direct.append(compiled)
        return make_boxed_func(compiled)  # type: ignore[no-any-return]

    fake_mode = detect_fake_mode(example_inputs)
    outer = TracingContext.try_get() or TracingContext(fake_mode)
    with tracing(outer), functorch_config.patch(unlift_effect_tokens=True):
        wrapped = aot_module_simplified(
            gm,
            list(example_inputs),
            fw_compiler=compile_functional,  # type: ignore[arg-type]
            bw_compiler=_no_backward,  # type: ignore[arg-type]
            decompositions={},
            keep_inference_input_mutations=True,
        )
    return direct[0] if direct else wrapped


def _no_backward(graph: GraphModule, inputs: Sequence[Any]) -> Compiled:
    raise AssertionError("a graph that needs gradients reached the inference pipeline")


def carry_dynamo_marks(source: GraphModule, target: GraphModule) -> None:
    """Make a graph derived from Dynamo's count as one: which inputs have static addresses (parameters, static
    caches) is read
    from these marks, and without them CUDA graphs would copy every weight and refuse to write the cache.
    """
    before = source.graph.find_nodes(op="placeholder")
    after = target.graph.find_nodes(op="placeholder")
    if len(before) > len(after) or "dynamo_compile_id" not in source.meta:
        return
    target.meta["dynamo_compile_id"] = source.meta["dynamo_compile_id"]
    target._param_name_to_source = getattr(source, "_param_name_to_source", {})  # type: ignore[assignment]
    for new in after[len(before) :]:  # hoisted values, which bring their own marks
        new._dynamo_source = None
    for old, new in zip(before, after, strict=False):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]


def _is_plain(metadata: Any, before: GraphModule, after: GraphModule) -> bool:
    """Whether AOTAutograd's runtime wrapper has nothing to do, so that it can be left out of every call."""
    if metadata is None:
        return False
    quiet = (
        getattr(metadata, "num_outputs_aliased", 1) == 0
        and getattr(metadata, "num_mutated_inp_runtime_indices", 1) == 0
    )
    inputs = [len(g.graph.find_nodes(op="placeholder")) for g in (before, after)]
    outputs = [len(g.graph.output_node().args[0]) for g in (before, after)]  # type: ignore[arg-type]
    return quiet and inputs[0] == inputs[1] and outputs[0] == outputs[1]


def nested_context(gm: GraphModule) -> Any:
    """A tracing context of its own for a compiler called on a graph that is being compiled already."""
    values = [
        n.meta["val"] for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor)
    ]
    return tracing(TracingContext(detect_fake_mode(values)))
