"""A function's graph before and after a pass of the lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def rewritten(
    function: Any, inputs: tuple[Tensor, ...], rewrite: Callable[[GraphModule], int]
) -> tuple[GraphModule, int, list[Tensor], list[Tensor]]:
    """The graph after the pass, what the pass returned, and the results before and after it."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        gm = make_fx(function)(*(mode.from_tensor(x) for x in inputs))
    want = gm(*inputs)
    count = rewrite(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    stable_topological_sort(gm.graph)
    gm.recompile()
    return gm, count, list(want), list(gm(*inputs))
