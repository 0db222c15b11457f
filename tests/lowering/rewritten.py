"""A function's graph before and after a pass of the lowering, with kernels that take anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.kernels import registry
from mlacompile.kernels.registry import Kernel


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


def willing(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Callable[..., Any]], *, name: str = "any",
    slower: Sequence[str] = (),
) -> None:  # fmt: skip
    """Let each of these ops have one kernel, of that name, which takes all inputs. slower: what speaks against it."""

    def kernel(op: str) -> Kernel:
        return Kernel(name, op, lambda *_, **__: [], runs[op], lambda *_, **__: list(slower))

    real = registry.kernels
    monkeypatch.setattr(registry, "kernels", lambda op: (kernel(op),) if op in runs else real(op))
