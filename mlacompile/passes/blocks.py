"""Views of a weight that is in FP8 already, as views of its values and of its scales.

    before   w = fp8_dequantize_weight(q, descale);  part of every head of w, [H, N, K]
    after    the same part of q [H, N, K], and of descale [H, N / 128, K / 128]

That is exact, and no copy of the weight in 16 bits is needed. It works where every head begins and ends between two
blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

import mlacompile.ops.fp8_linear  # noqa: F401  (registers the op that is looked for)
from mlacompile.geometry import SCALE_GROUP
from mlacompile.passes.emit import Emitter

aten = torch.ops.aten
_DEQUANTIZE = torch.ops.mlacompile.fp8_dequantize_weight.default
_RESHAPE = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_STEPS = _RESHAPE | {
    aten.slice.Tensor,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.t.default,
}


def dequantized_from(node: Node) -> Node | None:
    """The ``fp8_dequantize_weight`` that a value is a view of, or None."""
    while node.target is not _DEQUANTIZE:
        if node.target not in _STEPS or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return node


def in_blocks(emit: Emitter, node: Node) -> tuple[Node, Node] | None:
    """Values and scales of ``node`` [H, N, K], a view of a dequantized weight; None where heads cut through blocks."""
    source = dequantized_from(node)
    if source is None or any(size % SCALE_GROUP for size in source.meta["val"].shape):
        return None
    chain = []
    while node is not source:
        chain.append(node)
        node = node.all_input_nodes[0]
    q: Node = source.args[0]  # type: ignore[assignment]
    scales: Node = source.args[1]  # type: ignore[assignment]
    units: list[int] | None = [SCALE_GROUP, SCALE_GROUP]  # elements of each dimension that share a scale
    for step in reversed(chain):
        before = q.meta["val"].shape
        q = emit(step.target, q, *step.args[1:], **step.kwargs)
        assert units is not None
        scales, units = _same_of_scales(emit, step, before, q.meta["val"].shape, scales, units)
        if units is None:
            return None
    return (q, scales) if units == [1, SCALE_GROUP, SCALE_GROUP] else None


def _same_of_scales(
    emit: Emitter, step: Node, before: Sequence[int], after: Sequence[int], scales: Node, units: list[int]
) -> tuple[Node, list[int] | None]:
    """What a view of the values, from shape ``before`` to ``after``, is for their scales."""
    if step.target in _RESHAPE:
        moved = _reshaped(before, units, after)
        if moved is None:
            return scales, None
        return emit.view(scales, [size // unit for size, unit in zip(after, moved, strict=True)]), moved
    if step.target is aten.slice.Tensor:
        dim, start, end = _slice_of(step, before)
        if start % units[dim] or end % units[dim]:
            return scales, None
        return emit.narrow(scales, dim, start // units[dim], (end - start) // units[dim]), units
    moved_scales = emit(step.target, scales, *step.args[1:])
    if step.target is aten.unsqueeze.default:
        at = int(step.args[1])  # type: ignore[arg-type]
        at %= len(after)
        return moved_scales, [*units[:at], 1, *units[at:]]
    if step.target is aten.squeeze.dim:
        at = int(step.args[1]) % len(before)  # type: ignore[arg-type]
        return moved_scales, [u for i, u in enumerate(units) if i != at or before[at] != 1]
    order = [1, 0] if step.target is aten.t.default else step.args[1]
    return moved_scales, [units[i] for i in order]  # type: ignore[union-attr,index]


def _slice_of(step: Node, before: Sequence[int]) -> tuple[int, int, int]:
    dim, start, end = (*step.args[1:4], *(0, 0, None)[len(step.args) - 1 :])[:3]
    size = before[dim]  # type: ignore[index]
    return dim, start or 0, size if end is None else min(end, size)  # type: ignore[return-value,type-var]


def _reshaped(before: Sequence[int], units: Sequence[int], after: Sequence[int]) -> list[int] | None:
    """The units of a reshaped tensor: within dimensions that are merged or split, only the innermost may have one."""
    found: list[int] = []
    i, j = 0, 0
    while i < len(before) or j < len(after):
        # The smallest groups of dimensions, old and new, that hold the same elements.
        old, new = [i], [j]
        i, j = i + 1, j + 1
        if old[0] >= len(before) or new[0] >= len(after):
            return (
                None
                if any(units[k] != 1 for k in range(old[0], len(before)))
                else [*found, *[1] * (len(after) - new[0])]
            )
        a, b = before[old[0]], after[new[0]]
        while a != b:
            if a < b:
                a *= before[i]
                old.append(i)
                i += 1
            else:
                b *= after[j]
                new.append(j)
                j += 1
        unit = units[old[-1]]
        if any(units[k] != 1 for k in old[:-1]) or after[new[-1]] % unit:
            return None
        found += [*[1] * (len(new) - 1), unit]
    return found
