"""``explain(model, *args)``: what mlacompile would do for these arguments, without computing anything.

The model, its cache and its arguments are copied onto the meta device (shapes, no data), traced by Dynamo, and taken
through the same stages as in ``torch.compile``; nothing is lowered and no weight is read.
"""

from __future__ import annotations

import copy
import copyreg
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from mlacompile.compiler import allow_layer_by_layer, compile_graph
from mlacompile.errors import MLACompileError
from mlacompile.options import Options
from mlacompile.report import Product, Report

_ANY = 1 << 30  # versions: explaining has no limit of its own


def _meta_like(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """In place of ``Tensor.__deepcopy__``: the shape of a tensor, once for every tensor."""
    if id(tensor) not in memo:
        shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, torch.nn.Parameter):
            shape = torch.nn.Parameter(shape, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = shape
    return memo[id(tensor)]  # type: ignore[no-any-return]


_copying = threading.Lock()


@contextmanager
def _copies_are_meta() -> Iterator[None]:
    """Deep copies made in this context hold meta tensors, and say "meta" wherever the original remembers a device,
    as caches do."""
    devices = {torch.device: lambda device: (torch.device, ("meta",))}
    with (
        _copying,
        patch.object(torch.Tensor, "__deepcopy__", _meta_like),
        patch.object(torch.nn.Parameter, "__deepcopy__", _meta_like),
        patch.dict(copyreg.dispatch_table, devices),
    ):
        yield


def explain(
    model: Callable[..., Any], *args: Any, options: Options | Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile ``model`` for these arguments, run nothing on the weights, and say what would be rewritten.

    Args:
        model: a module or function. args, kwargs: what it would be called with, caches included; they are not changed.
        options: as for the backend.
    Raises:
        OptionsError, RefusedSiteError: as the backend does.
    """
    _, graphs = _analyse(model, args, kwargs, Options.parse(options))
    return Report.merge(report for report, _ in graphs)


def products(
    model: nn.Module, *args: Any, options: Options | Mapping[str, Any] | None = None, **kwargs: Any
) -> list[tuple[Product, tuple[str, ...]]]:
    """Every product with a weight that ``model`` would compute for these arguments, compiled with an ``fp8`` option,
    and the names of the parameters that its weight is made of. Arguments and errors as for :func:`explain`."""
    shadow, graphs = _analyse(model, args, kwargs, Options.parse(options))
    names = {id(parameter): name for name, parameter in shadow.named_parameters()}
    return [
        (product, tuple(names[id(inputs[i])] for i in product.inputs if id(inputs[i]) in names))
        for report, inputs in graphs
        for product in report.products
    ]


def _analyse(model: Any, args: Any, kwargs: Any, options: Options) -> tuple[Any, list[tuple[Report, Sequence[Any]]]]:
    """A copy of the model without memory, and for each of its graphs the report and the inputs."""
    graphs: list[tuple[Report, Sequence[Any]]] = []

    def analyse(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        _, report = compile_graph(gm, example_inputs, options, lower=False)
        graphs.append((report, example_inputs))
        return gm.forward  # type: ignore[return-value]

    with _copies_are_meta():
        shadow, args, kwargs = copy.deepcopy((model, args, kwargs))
    # To Dynamo every copy is another version of the model's code, and by default it gives up on the ninth: here, and
    # when the model itself is compiled afterwards.
    allow_layer_by_layer()
    try:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_ANY, accumulated_recompile_limit=_ANY):
            torch.compile(shadow, backend=analyse)(*args, **kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, MLACompileError):
            raise error.inner_exception from None
        raise
    return shadow, graphs
