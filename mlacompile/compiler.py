"""The torch.compile backend: orders the stages, has no logic of its own.

    model = torch.compile(model, backend="mlacompile")

A graph that needs gradients, or holds no attention, or none that can be rewritten, goes to Inductor exactly as
Dynamo made it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch._guards import CompileContext
from torch.fx import GraphModule

from mlacompile.errors import OptionsError
from mlacompile.logs import dump_graph, log
from mlacompile.lowering.cudagraphs import forget_recordings
from mlacompile.lowering.derived import with_derived
from mlacompile.lowering.inductor import compile_rest
from mlacompile.lowering.place import place
from mlacompile.lowering.read_early import take_out, with_before
from mlacompile.lowering.select import reads_fp8, slower_in_fp8, spoilt_in_fp8
from mlacompile.options import Options, check_mode
from mlacompile.passes.canonicalize import canonicalize_sdpa, may_hold_attention
from mlacompile.passes.functionalize import carry_dynamo_marks, functionalize, nested_context
from mlacompile.passes.pipeline import Pipeline
from mlacompile.passes.verify import verified_once
from mlacompile.report import JOURNAL, Report

Compiled = Callable[..., Any]
_graphs = itertools.count()
_warned: set[str] = set()

#: Dynamo stops compiling a function after this many versions of it. Layers compiled one by one share one function
#: and are
#: guarded on their number, so torch's default (8) would leave the ninth layer, and all after it, in eager mode.
RECOMPILE_LIMIT = 256


class _NothingToRewrite(Exception):
    """No site was rewritten: the graph goes to Inductor as Dynamo made it."""


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Compiled:
    """Compile one Dynamo graph.

    Args:
        gm, example_inputs: what Dynamo passes.
        mode: a mode of torch.compile, passed on to Inductor.
        options: see :class:`mlacompile.Options`.
    Raises:
        OptionsError: unknown option, value, mode or argument.
        RefusedSiteError: with ``strict=True``, when an attention op cannot be rewritten.
    """
    if kwargs:
        raise OptionsError(f"unknown arguments {', '.join(map(repr, kwargs))}; pass options={{...}} and mode only")
    chosen, mode = Options.parse(options), check_mode(mode)
    allow_layer_by_layer()
    compiled, report = compile_graph(gm, example_inputs, chosen, mode)
    frame, compilation = _frame()
    JOURNAL.add(frame, compilation, report)
    return compiled


def _reset() -> None:
    JOURNAL.clear()
    forget_recordings()


backend.reset = _reset  # type: ignore[attr-defined]  # called by torch._dynamo.reset()


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None = None, *, lower: bool = True
) -> tuple[Compiled, Report]:
    """Compile one Dynamo graph and say what was done. With ``lower=False`` everything but the last stage: a graph to
    look at."""

    def finish(graph: GraphModule, inputs: Sequence[Any]) -> Compiled:
        return compile_rest(graph, inputs, options, mode) if lower else graph.forward  # type: ignore[return-value]

    if _needs_gradients(example_inputs):
        note = (
            "a graph that needs gradients was left to Inductor: mlacompile is for inference; "
            "call the model under torch.no_grad() or torch.inference_mode()"
        )
        _warn_once(note)
        return finish(gm, example_inputs), Report(notes=(note,))
    if options.fp8 == "off" and not may_hold_attention(gm):
        return finish(gm, example_inputs), Report()
    parameters = [_is_weight(n, x) for n, x in _inputs(gm, example_inputs)]
    pipeline = Pipeline(
        options,
        parameters,
        f"graph{next(_graphs)}",
        slower_in_fp8=slower_in_fp8,
        reads_fp8=partial(reads_fp8, options.kernel),
        spoilt_in_fp8=lambda position: spoilt_in_fp8(example_inputs[position]),
        untracked=[isinstance(x, torch.Tensor) and x.is_inference() for x in example_inputs],
    )
    dump_graph(options.dump, pipeline.name, "0-dynamo", gm)
    canonical = canonicalize_sdpa(gm)
    carry_dynamo_marks(gm, canonical)
    dump_graph(options.dump, pipeline.name, "1-canonical", canonical)

    def stages(graph: GraphModule, inputs: Sequence[Any]) -> Compiled:
        rewritten = pipeline.run(graph)
        if not pipeline.rewritten:
            raise _NothingToRewrite
        with pipeline.stage("lower"):
            fused = options.rest == "inductor"
            placed = place(rewritten, options.kernel, pipeline.notes, pipeline.weights, fused=fused)
            for node, (kernel, passed) in placed.items():
                pipeline.served(node, kernel, passed)
            before = take_out(rewritten)
        dump_graph(options.dump, pipeline.name, "6-lowered", rewritten)
        carry_dynamo_marks(canonical, rewritten)
        with pipeline.stage("compile the rest"), nested_context(rewritten):
            more = () if before is None else before.examples
            compiled = finish(rewritten, [*inputs, *pipeline.derived, *more])
            return with_derived(with_before(compiled, before), pipeline.hoisted)

    try:
        with pipeline.stage("all"):
            compiled = functionalize(canonical, example_inputs, stages)
    except _NothingToRewrite:
        compiled = finish(gm, example_inputs)
    else:
        compiled = verified_once(compiled, gm, options)
    report = pipeline.report()
    log.info("%s: %s", pipeline.name, report.summary())
    return compiled, report


def _inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> zip[tuple[torch.fx.Node, Any]]:
    return zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)


def _is_weight(node: torch.fx.Node, value: Any) -> bool:
    """A parameter, or a tensor that belongs to a module: its address is static, and the pipeline checks it is never
    written."""
    return isinstance(value, torch.nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        log.warning("%s", text)


def _frame() -> tuple[Any, Any]:
    """Which frame is being compiled, and which compilation of it this is."""
    compile_id = CompileContext.current_compile_id()
    if compile_id is None:
        return next(_graphs), 0
    return compile_id.frame_id, compile_id.frame_compile_id


def allow_layer_by_layer() -> None:
    """Let Dynamo keep as many versions of a function as models have layers: it looks before it asks any backend."""
    config = torch._dynamo.config
    if config.recompile_limit < RECOMPILE_LIMIT:
        log.debug("raising torch._dynamo.config.recompile_limit from %d to %d", config.recompile_limit, RECOMPILE_LIMIT)
        config.recompile_limit = RECOMPILE_LIMIT
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * RECOMPILE_LIMIT)
