"""Stage 5: products with weights run in FP8, where that pays and nothing is at stake that FP8 would spoil.

    before   y = mm(x, wᵀ)                                   (and addmm, and bmm with a weight for every head)
    after    wq, ws = fp8_quantize_weight(w)
             y = fp8_linear(x, None, wq, ws)                 few rows, and heads: x stays as it is
             xq, xs = fp8_quantize(x, 128);  y = fp8_linear(xq, xs, wq, ws)

Activations have a scale for every 128 values of a row, weights one for each block of 128 × 128, all e4m3 (arXiv
2412.19437, section 3.3). What is done to weights is hoisted afterwards. Products of the same x become one, of all their
weights, where blocks end with the weights: few large products read memory faster than many small ones.

Left alone, unless a mapping asks for them by source: products whose result chooses (it reaches a top-k), or leaves the
graph (the output head), and those that FP8 would not make faster.
"""

from __future__ import annotations

import fnmatch
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

import mlacompile.ops.fp8_experts
import mlacompile.ops.fp8_linear  # noqa: F401  (registers the ops that are written, and looked for)
from mlacompile.gate import Gate
from mlacompile.geometry import SCALE_GROUP
from mlacompile.ops.fp8_linear import WEIGHT_ONLY_ROWS
from mlacompile.passes.axes import Size, shape_of
from mlacompile.passes.blocks import dequantized_from, in_blocks
from mlacompile.passes.cone import dynamic_nodes
from mlacompile.passes.emit import Emitter
from mlacompile.passes.hoist import HOISTED
from mlacompile.passes.pull import REARRANGE
from mlacompile.passes.source import source_of
from mlacompile.report import Product

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
    torch.ops.mlacompile.fp8_experts.default,
}


#: Kinds of products that a mode takes.
TAKEN = {"off": (), "weights": (False,), "absorb": (True,), "all": (False, True)}


@dataclass(frozen=True)
class Linear:
    """A product with a weight: ``[M, K] · [N, K]ᵀ`` and perhaps a bias, or, one a head, ``[H, M, K] · [H, K, N]``."""

    node: Node
    weight: Node
    bias: Node | None = None

    @property
    def x(self) -> Node:
        """The left factor; read anew each time, for the product that made it may have been rewritten."""
        return self.node.args[1 if self.node.target is aten.addmm.default else 0]  # type: ignore[return-value]

    @property
    def by_head(self) -> bool:
        """Whether every head has a weight of its own, as absorbed products have."""
        return self.node.target is aten.bmm.default

    @property
    def shape(self) -> tuple[Size, int, int]:
        """M, N, K."""
        *_, n, k = shape_of(self.weight)  # type: ignore[misc]
        return shape_of(self.x)[-2], *((int(k), int(n)) if self.by_head else (int(n), int(k)))  # type: ignore[index]

    @property
    def value(self) -> torch.Tensor:
        """The weight ``[N, K]`` or ``[H, N, K]``, fake."""
        value: torch.Tensor = self.weight.meta["val"]
        return value.transpose(1, 2) if self.by_head else value

    @property
    def keeps_x(self) -> bool:
        """Whether x is left in its own dtype. Absorbed queries and outputs always are: they are few, and delicate."""
        rows = self.shape[0]
        return self.by_head or (isinstance(rows, int) and rows <= WEIGHT_ONLY_ROWS)

    @property
    def where(self) -> tuple[str, ...]:
        """What a pattern may match: ``file:line``, and the path of the module."""
        stack = self.node.meta.get("nn_module_stack") or {}
        paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
        return (source_of(self.node), *(p.replace("L['self'].", "") for p in paths[-1:]))


def find(graph: Graph, weights: set[Node]) -> Iterator[Linear]:
    """All products of the graph with a weight of their own, or with one for every head made of weights alone."""
    dynamic = dynamic_nodes(graph, weights)
    for node in graph.nodes:
        if node.op != "call_function" or node.kwargs:
            continue
        if node.target is aten.bmm.default:
            x, right = node.args
            if x in dynamic and right not in dynamic and right.target is not aten.expand.default:
                yield Linear(node, right)
        elif node.target in (aten.mm.default, aten.addmm.default):
            bias, (x, y) = (node.args[0], node.args[1:3]) if len(node.args) == 3 else (None, node.args)
            if y.target in _TRANSPOSED and y.args[0] in weights and x not in weights:
                yield Linear(node, y.args[0], bias)


@dataclass(frozen=True)
class Policy:
    """Which products run in FP8.

    fp8: a mode for all ("off", "weights", "absorb", "all"); or patterns of sources (``*/modeling_x.py:120``,
    ``*.q_b_proj``), the first that matches counts, and asks for a product even where FP8 does not pay; or what
    calibration found, which says what is safe and asks for nothing.
    """

    fp8: str | Mapping[str, str] | Gate = "off"
    #: Why FP8 would not be faster for x, weight (fake tensors), or None.
    slower: Callable[[torch.Tensor, torch.Tensor], str | None] = lambda x, weight: None
    #: Why a weight, a placeholder, would not survive FP8, or None.
    spoilt: Callable[[Node], str | None] = lambda weight: None

    def refuse(self, linear: Linear) -> str | None:
        """Why a product stays as it is, or None."""
        mode, asked = self._mode(linear)
        if linear.by_head not in TAKEN[mode]:
            return f"fp8 is {mode}" + (" for this source" if not isinstance(self.fp8, str) else "")
        if (unfit := _unfit(linear)) or asked:
            return unfit
        slower = _kept(linear) or self.slower(linear.x.meta["val"], linear.value)
        return slower or (None if linear.by_head else self.spoilt(linear.weight))

    def _mode(self, linear: Linear) -> tuple[str, bool]:
        if isinstance(self.fp8, str):
            return self.fp8, False
        if isinstance(self.fp8, Gate):
            return self.fp8.mode(linear.where), False
        for pattern, mode in self.fp8.items():
            if any(fnmatch.fnmatchcase(where, pattern) for where in linear.where):
                return mode, True
        return "off", False


def _unfit(linear: Linear) -> str | None:
    _, n, k = linear.shape
    dtype = linear.weight.meta["val"].dtype
    if dtype not in _FLOATS or linear.x.meta["val"].dtype != dtype:
        return f"weights of {str(dtype).removeprefix('torch.')}"
    smallest = SCALE_GROUP // 2 if linear.by_head else SCALE_GROUP
    if n < smallest or k < smallest:
        return f"weights smaller than {smallest} × {smallest}"
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


def quantize(graph: Graph, weights: set[Node], policy: Policy) -> tuple[list[Product], list[str]]:
    """Rewrite what the policy takes; returns what became of every product, and remarks for the report."""
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    rows: dict[Node, list[Linear]] = {}
    products: list[Product] = []
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    for linear in list(find(graph, weights)):
        _, n, k = linear.shape
        sources = tuple(inputs[node] for node in _made_of(linear.weight, weights))
        where, shape = linear.where, tuple(linear.value.shape)
        reason = policy.refuse(linear)
        if reason is None and linear.by_head:
            reason = _rewrite_heads(linear)
        elif reason is None:
            rows.setdefault(linear.x, []).append(linear)
        products.append(Product(where[-1], where[0], shape, reason, sources))
        if reason is not None:
            left[reason] += 1
            continue
        heads = f"{shape[0]} heads of " if len(shape) == 3 else ""
        taken[f"{heads}{n} × {k}"] += 1
    quantized: dict[Node, tuple[Node, Node]] = {}
    for of_one_x in rows.values():
        for group in _merged(of_one_x):
            _rewrite(group, quantized)
    return products, _remarks(taken, left)


def _made_of(node: Node, weights: set[Node]) -> list[Node]:
    """The weights that a value is made of."""
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        here = stack.pop()
        if here in weights:
            found[here] = None
        stack += here.all_input_nodes
    return list(found)


def _merged(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Products of one x in groups that are one product each: blocks must end where the weights do, but for the last.

    Those of a single row stay apart: a kernel reads several weights at once, and takes what stands around each.
    """
    if isinstance(linears[0].shape[0], int) and linears[0].shape[0] == 1:
        return [[x] for x in linears]
    whole = [x for x in linears if x.shape[1] % SCALE_GROUP == 0]
    rest = [x for x in linears if x.shape[1] % SCALE_GROUP]
    dtypes = {x.node.meta["val"].dtype for x in linears}
    if not whole or len(dtypes) > 1 or len({x.weight for x in linears}) < len(linears):
        return [[x] for x in linears]
    return [[*whole, *rest[:1]], *([x] for x in rest[1:])]


def _rewrite(group: list[Linear], quantized: dict[Node, tuple[Node, Node]]) -> None:
    """One product in the place of the first of a group, and its parts in the places of all."""
    order = {node: i for i, node in enumerate(group[0].node.graph.nodes)}
    emit, ops = Emitter(min((x.node for x in group), key=order.__getitem__)), torch.ops.mlacompile
    weights = [x.weight for x in group]
    weight = weights[0] if len(weights) == 1 else emit(aten.cat.default, weights)
    blocks = _both(emit, emit(ops.fp8_quantize_weight.default, weight))
    x, dtype = group[0].x, group[0].node.meta["val"].dtype
    if group[0].keeps_x:
        left: tuple[Node, Node | None] = (x, None)
    else:
        if x not in quantized:
            quantized[x] = _both(emit, emit(ops.fp8_quantize.default, x, SCALE_GROUP, E4M3))
        left = quantized[x]
    product = emit(ops.fp8_linear.default, *left, *blocks, dtype)
    outs = [product]
    if len(group) > 1:
        ends = list(itertools.accumulate(linear.shape[1] for linear in group))
        parts = [emit.narrow(product, 1, end - linear.shape[1], linear.shape[1]) for end, linear in zip(ends, group)]
        # What follows was traced on contiguous results, and views them; Inductor fuses these copies away.
        outs = [emit(aten.clone.default, part, memory_format=torch.contiguous_format) for part in parts]
    for linear, out in zip(group, outs, strict=True):
        if linear.bias is not None:
            out = Emitter(linear.node)(aten.add.Tensor, out, linear.bias)
        linear.node.replace_all_uses_with(out)
        linear.node.graph.erase_node(linear.node)


def _rewrite_heads(linear: Linear) -> str | None:
    """A product with a weight for every head, in the place of ``bmm``; or why not."""
    emit, ops = Emitter(linear.node), torch.ops.mlacompile
    weight = emit.permute(linear.weight, [0, 2, 1])
    if dequantized_from(weight) is None:
        q, descale = _both(emit, emit(ops.fp8_quantize_weight.default, weight))
    else:
        found = in_blocks(emit, weight)
        if found is None:
            return "the weight is in FP8 already, and its blocks do not end with the heads: it is dequantized once"
        q, descale = (_rows_contiguous(emit, part) for part in found)
    out = emit(ops.fp8_linear.default, linear.x, None, q, descale, linear.node.meta["val"].dtype)
    linear.node.replace_all_uses_with(out)
    linear.node.graph.erase_node(linear.node)
    return None


def _rows_contiguous(emit: Emitter, part: Node) -> Node:
    """Values or scales of a weight with rows that lie in one piece; a copy, where there must be one, is hoisted."""
    value = part.meta["val"]
    if value.stride(-1) == 1 or value.shape[-1] == 1:
        return part
    copy = emit(aten.clone.default, part, memory_format=torch.contiguous_format)
    copy.meta[HOISTED] = True
    return copy


def _both(emit: Emitter, pair: Node) -> tuple[Node, Node]:
    return emit(operator.getitem, pair, 0), emit(operator.getitem, pair, 1)


def _remarks(taken: Counter[str], left: Counter[str]) -> list[str]:
    remarks = []
    if taken:
        shapes = ", ".join(f"{n} of {shape}" for shape, n in taken.items())
        remarks.append(f"FP8: {sum(taken.values())} products with weights ({shapes})")
    return remarks + [f"FP8: {n} products left as they were: {reason}" for reason, n in left.items()]
