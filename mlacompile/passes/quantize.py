"""Stage 5: products with weights run in FP8, where that pays and nothing is at stake that FP8 would spoil.

    before   y = mm(x, wᵀ)                                              (and addmm)
    after    xq, xs = fp8_quantize(x, 128);  wq, ws = fp8_quantize_weight(w)
             y = fp8_linear(xq, xs, wq, ws)

Activations have a scale for every 128 values of a row, weights one for each block of 128 × 128, all e4m3 (arXiv
2412.19437, section 3.3). Products of the same x share its quantization; what is done to weights is hoisted afterwards.

Left alone, unless a mapping asks for them by source: products whose result chooses (it reaches a top-k), or leaves the
graph (the output head), and those that FP8 would not make faster.
"""

from __future__ import annotations

import fnmatch
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

import mlacompile.ops.fp8_linear  # noqa: F401  (registers the ops that are written)
from mlacompile.geometry import SCALE_GROUP
from mlacompile.passes.axes import REARRANGE, Size, shape_of
from mlacompile.passes.emit import Emitter
from mlacompile.passes.source import source_of

aten = torch.ops.aten
E4M3 = torch.float8_e4m3fn
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_TRANSPOSED = {aten.t.default, aten.permute.default, aten.transpose.int}
_CHOOSES = {aten.topk.default, aten.sort.default, aten.argmax.default}
_PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._grouped_mm.default,
    torch.ops.mlacompile.fp8_linear.default,
}


@dataclass(frozen=True)
class Linear:
    """A product ``[M, K] · [N, K]ᵀ`` with a weight, and perhaps a bias."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None

    @property
    def shape(self) -> tuple[Size, int, int]:
        """M, N, K."""
        n, k = shape_of(self.weight)  # type: ignore[misc]
        return shape_of(self.x)[0], int(n), int(k)  # type: ignore[index]

    @property
    def where(self) -> tuple[str, ...]:
        """What a pattern may match: ``file:line``, and the path of the module."""
        stack = self.node.meta.get("nn_module_stack") or {}
        paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
        return (source_of(self.node), *(p.replace("L['self'].", "") for p in paths[-1:]))


def find(graph: Graph, weights: set[Node]) -> Iterator[Linear]:
    """All products of the graph with a weight of their own."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default):
            continue
        bias, (x, y) = (node.args[0], node.args[1:3]) if len(node.args) == 3 else (None, node.args)
        if y.target in _TRANSPOSED and y.args[0] in weights and x not in weights and not node.kwargs:
            yield Linear(node, x, y.args[0], bias)


@dataclass(frozen=True)
class Policy:
    """Which products run in FP8.

    modes: "off", or a mode for all; or patterns of sources (``*/modeling_x.py:120``, ``*.q_b_proj``), the first that
    matches counts, and asks for a product even where FP8 does not pay.
    """

    fp8: str | Mapping[str, str] = "off"
    #: Why FP8 would not be faster for x, weight (fake tensors), or None.
    slower: Callable[[torch.Tensor, torch.Tensor], str | None] = lambda x, weight: None

    def refuse(self, linear: Linear) -> str | None:
        """Why a product stays as it is, or None."""
        mode, asked = self._mode(linear)
        if mode == "off":
            return "fp8 is off for this source" if asked else "fp8 is off"
        return _unfit(linear) or (None if asked else _kept(linear) or self._slower(linear))

    def _slower(self, linear: Linear) -> str | None:
        return self.slower(linear.x.meta["val"], linear.weight.meta["val"])

    def _mode(self, linear: Linear) -> tuple[str, bool]:
        if isinstance(self.fp8, str):
            return self.fp8, False
        for pattern, mode in self.fp8.items():
            if any(fnmatch.fnmatchcase(where, pattern) for where in linear.where):
                return mode, True
        return "off", False


def _unfit(linear: Linear) -> str | None:
    _, n, k = linear.shape
    dtype = linear.weight.meta["val"].dtype
    if dtype not in _FLOATS or linear.x.meta["val"].dtype != dtype:
        return f"weights of {str(dtype).removeprefix('torch.')}"
    if n < SCALE_GROUP or k < SCALE_GROUP:
        return f"weights smaller than a block of {SCALE_GROUP} × {SCALE_GROUP}"
    return None


def _kept(linear: Linear) -> str | None:
    """Results where a small error is a large one."""
    if _reaches(linear.node, _CHOOSES):
        return "the result is what experts or tokens are chosen by"
    if _leaves(linear.node):
        return "the result leaves the graph: an output head"
    return None


def _reaches(node: Node, targets: set[Any]) -> bool:
    """Whether a value goes into one of ``targets`` before the next product."""
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen or user.target in _PRODUCTS:
            continue
        if user.target in targets:
            return True
        seen.add(user)
        stack += user.users
    return False


def _leaves(node: Node) -> bool:
    """Whether a value is, but for its shape and dtype, an output of the graph and nothing else."""
    passed = REARRANGE.keys() | {aten._to_copy.default, aten.slice.Tensor}
    users = list(node.users)
    return bool(users) and all(u.op == "output" or (u.target in passed and _leaves(u)) for u in users)


def quantize(graph: Graph, weights: set[Node], policy: Policy) -> tuple[int, list[str]]:
    """Rewrite what the policy takes; returns how many products, and remarks for the report."""
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    rows: dict[Node, tuple[Node, Node]] = {}
    blocks: dict[Node, tuple[Node, Node]] = {}
    for linear in list(find(graph, weights)):
        _, n, k = linear.shape
        reason = policy.refuse(linear)
        if reason is not None:
            left[reason] += 1
            continue
        _rewrite(linear, rows, blocks)
        taken[f"{n} × {k}"] += 1
    return sum(taken.values()), _remarks(taken, left)


def _rewrite(linear: Linear, rows: dict[Node, tuple[Node, Node]], blocks: dict[Node, tuple[Node, Node]]) -> None:
    emit, ops = Emitter(linear.node), torch.ops.mlacompile
    if linear.weight not in blocks:
        blocks[linear.weight] = _both(emit, emit(ops.fp8_quantize_weight.default, linear.weight))
    if linear.x not in rows:
        rows[linear.x] = _both(emit, emit(ops.fp8_quantize.default, linear.x, SCALE_GROUP, E4M3))
    dtype = linear.node.meta["val"].dtype
    out = emit(ops.fp8_linear.default, *rows[linear.x], *blocks[linear.weight], dtype)
    if linear.bias is not None:
        out = emit(aten.add.Tensor, out, linear.bias)
    linear.node.replace_all_uses_with(out)
    linear.node.graph.erase_node(linear.node)


def _both(emit: Emitter, pair: Node) -> tuple[Node, Node]:
    return emit(operator.getitem, pair, 0), emit(operator.getitem, pair, 1)


def _remarks(taken: Counter[str], left: Counter[str]) -> list[str]:
    remarks = []
    if taken:
        shapes = ", ".join(f"{n} of {shape}" for shape, n in taken.items())
        remarks.append(f"FP8: {sum(taken.values())} products with weights ({shapes})")
    return remarks + [f"FP8: {n} products left as they were: {reason}" for reason, n in left.items()]
