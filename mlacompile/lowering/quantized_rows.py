"""Rows that are quantized for a product, with what stands before them, become one pass over them.

    fp8_quantize(rms(a + b) · w)         →  mlacompile::quantize_rows(a, b, w), which returns a + b, too; where a is a
                                            product that is made in parts of K, it adds those up
    fp8_quantize(act(g) · u)             →  mlacompile::quantize_rows(g, gated=u)
    fp8_quantize(heads side by side)     →  mlacompile::quantize_rows(heads, as attention leaves them)

To Inductor a mean over a row and the largest values of its groups are loops of different shape, so it reads rows in two
or three kernels. What another node wants as well is left to it.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

import mlacompile.ops.fp8_linear_parts
import mlacompile.ops.quantize_rows  # noqa: F401  (both register an op)
from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels import registry
from mlacompile.kernels.fp8_linear.stream_tiles import stream_parts
from mlacompile.lowering.around_row import activation_of, norm_before, through_views
from mlacompile.ops.fp8_linear import E4M3
from mlacompile.passes.emit import Emitter
from mlacompile.passes.pull import RESHAPES

aten = torch.ops.aten
_QUANTIZE = torch.ops.mlacompile.fp8_quantize.default
_FP8_LINEAR = torch.ops.mlacompile.fp8_linear.default
_FP8_PARTS = torch.ops.mlacompile.fp8_linear_parts.default
_QUANTIZE_ROWS = torch.ops.mlacompile.quantize_rows.default
MOST_VALUES = 1 << 24  # of rows whose moves are looked through
_MOVES = RESHAPES | {aten.permute.default, aten.transpose.int, aten.clone.default}


def place_quantized_rows(gm: GraphModule) -> int:
    """Write such calls into a functional ATen graph, where a kernel takes them; returns how many."""
    placed = 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.find_nodes(op="call_function", target=_QUANTIZE):
        rows: Any = node.args[0]
        value: Tensor = rows.meta["val"]
        fixed = value.dim() == 2 and not any(isinstance(size, torch.SymInt) for size in value.shape)
        if node.args[1:] == (SCALE_GROUP, E4M3) and fixed and _is_wanted_once(rows):
            placed += _normed(node, order) or _gated(node) or _of_heads(node)
    return placed


def _is_wanted_once(rows: Node) -> bool:
    """Whether nothing but its quantization wants a value, past views and casts."""
    while len(rows.users) == 1 and rows.op == "call_function" and through_views(rows) is not rows:
        rows = rows.args[0]  # type: ignore[assignment]
    return len(rows.users) == 1 and rows.op == "call_function"


def _normed(node: Node, order: dict[Node, int]) -> bool:
    """Rows come out of a norm, and perhaps of a sum before that."""
    m, k = _shape(node.args[0])
    norm = norm_before(node.args[0])  # type: ignore[arg-type]
    if norm is None:
        return False
    terms: Any = norm.x.args[:2] if norm.x.target is aten.add.Tensor and not norm.x.kwargs else ()
    values = [t.meta["val"] if isinstance(t, Node) else None for t in terms]
    whole = norm.x.meta["val"]
    summed = len(terms) == 2 and all(
        isinstance(v, Tensor) and v.dtype == whole.dtype and v.shape == whole.shape for v in values
    )
    if not summed or order.get(norm.weight, len(order)) > order.get(norm.x, -1):
        emit = Emitter(node)
        return _placed(node, emit, emit.view(norm.x, [m, k]), None, emit.view(norm.weight, [k]), None, norm.eps)
    emit = Emitter(norm.x.next)  # others want the sum sooner than this product wants its rows
    weight = emit.view(norm.weight, [k])
    for one, other in (terms, terms[::-1]):
        if (parts := _in_parts(one, emit, m)) is not None:
            return _placed(
                node, emit, parts, emit.view(other, [m, k]), weight, None, norm.eps, total=norm.x, parts=True
            )
    x, added = (emit.view(t, [m, k]) for t in terms)
    return _placed(node, emit, x, added, weight, None, norm.eps, total=norm.x)


def _in_parts(node: Any, emit: Emitter, m: int) -> Node | None:
    """The parts of an FP8 product that nothing but this sum wants, if a kernel makes it in parts."""
    while len(node.users) == 1 and node.op == "call_function" and node.target in RESHAPES:
        node = node.args[0]
    if node.target is not _FP8_LINEAR or len(node.users) != 1:
        return None
    values: Any = torch.fx.map_arg(node.args, lambda n: n.meta["val"])
    if values[1] is None or values[2].dim() != 2 or values[4].itemsize != 2:
        return None
    n, k = values[2].shape
    parts = stream_parts(m, n, k, values[0].device)
    kernel, _ = registry.best("fp8_linear_parts", *values[:4], parts)
    if parts == 1 or kernel is None or kernel.slower(*values[:4], parts):
        return None
    return emit(_FP8_PARTS, *node.args[:4], parts, impl=kernel.name)


def _gated(node: Node) -> bool:
    """Rows are the product of an activation and what it gates."""
    m, k = _shape(node.args[0])
    product = through_views(node.args[0])  # type: ignore[arg-type]
    if product.target is not aten.mul.Tensor or not all(isinstance(a, Node) for a in product.args):
        return False
    for activated, gated in (product.args, product.args[::-1]):
        name = activation_of(through_views(activated))  # type: ignore[arg-type]
        source: Any = through_views(activated).args[0] if name else None  # type: ignore[arg-type]
        if name and _alike(source, gated, node.args[0]):
            emit = Emitter(node)
            x, other = emit.view(source, [m, k]), emit.view(gated, [m, k])  # type: ignore[arg-type]
            return _placed(node, emit, x, None, None, other, 0.0, gate=name)
    return False


def _of_heads(node: Node) -> bool:
    """Rows are heads of 128 values, side by side, that lie one behind the other ``[H, M, 128]``."""
    m, k = _shape(node.args[0])
    moves: list[Node] = []
    source: Any = node.args[0]
    while source.op == "call_function" and source.target in _MOVES:
        moves.append(source)
        source = source.args[0]
    shape = (k // SCALE_GROUP, m, SCALE_GROUP)
    if shape[0] < 2 or k % SCALE_GROUP or not moves or tuple(_shape(source)) != shape or m * k > MOST_VALUES:
        return False
    steps = tuple((move.target, _frozen(move.args[1:]), _frozen(tuple(move.kwargs.items()))) for move in moves)
    if any(len(move.all_input_nodes) > 1 for move in moves) or not _side_by_side(shape, steps[::-1]):
        return False
    emit = Emitter(node)
    return _placed(node, emit, emit.permute(source, [1, 0, 2]), None, None, None, 0.0)


@lru_cache(maxsize=64)  # layers are alike
def _side_by_side(shape: tuple[int, int, int], moves: tuple[Any, ...]) -> bool:
    """Whether moves bring heads ``[H, M, 128]`` side by side: seen from where each value comes."""
    heads, m, width = shape
    with unset_fake_temporarily():
        moved = start = torch.arange(heads * m * width, dtype=torch.int32).view(shape)
        for op, args, kwargs in moves:
            moved = op(moved, *args, **dict(kwargs))
        return torch.equal(moved, start.transpose(0, 1).reshape(m, heads * width))


def _frozen(x: Any) -> Any:
    return tuple(map(_frozen, x)) if isinstance(x, (list, tuple)) else x


def _placed(
    node: Node, emit: Emitter, x: Node, added: Node | None, norm: Node | None, gated: Node | None, eps: float,
    *, gate: str = "", total: Node | None = None, parts: bool = False,
) -> bool:  # fmt: skip
    """Write one call in place of a quantization, and of the sum before it, if a kernel takes it."""
    arguments, settings = (x, added, norm, gated), {"eps": eps, "gate": gate, "parts": parts}
    values = [None if a is None else a.meta["val"] for a in arguments]
    kernel, _ = registry.best("quantize_rows", *values, **settings)
    if kernel is None:
        return False
    made = emit(_QUANTIZE_ROWS, *arguments, **settings, impl=kernel.name)
    if total is not None:
        again = emit.view(emit(operator.getitem, made, 2), list(_shape(total)))
        total.replace_all_uses_with(again)
    node.replace_all_uses_with(made)  # the first two results are what it returned
    node.graph.erase_node(node)
    return True


def _alike(*nodes: Any) -> bool:
    values = [node.meta["val"] for node in nodes]
    return all(v.dtype == values[0].dtype and v.numel() == values[0].numel() for v in values)


def _shape(node: Any) -> Any:
    return node.meta["val"].shape
