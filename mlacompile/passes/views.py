"""Turn "element 4711 of that weight" back into an exact view of it.

Probing a cone with element numbers as weights tells which element of which weight multiplies each latent value for each
head and row. When these numbers are affine in (head, row, rank), they are a view: split dimensions, keep a range of
each
part, reorder. Only shapes are involved, never strides or storage offsets, so one compiled graph serves every layer that
has weights of the same shape, wherever those lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class View:
    """A strided view of a weight: ``x.narrow(...).view(shape).slice(...).permute(order)``, merged dims of size one
    dropped."""

    narrows: tuple[tuple[int, int, int], ...]  # (dim, start, length) on the weight itself
    shape: tuple[int, ...]  # its dimensions, split into factors
    ranges: tuple[tuple[int, int], ...]  # (start, length) kept of every factor
    order: tuple[int, ...]  # which factor is which axis of the result; the others have length one
    sizes: tuple[int, ...]  # shape of the result

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The view of a tensor; never copies."""
        for dim, start, length in self.narrows:
            x = x.narrow(dim, start, length)
        x = x.view(self.shape)
        for dim, (start, length) in enumerate(self.ranges):
            x = x.narrow(dim, start, length)
        rest = [d for d in range(x.dim()) if d not in self.order]
        x = x.permute([*[d for d in self.order if d >= 0], *rest])
        for _ in rest:
            x = x.squeeze(-1)
        for axis, factor in enumerate(self.order):
            if factor < 0:
                x = x.unsqueeze(axis)
        return x


def find_view(shape: Sequence[int], offset: int, axes: Sequence[tuple[int, int]]) -> View | None:
    """The view whose element (i, j, …) is element ``offset + Σ index · stride`` of a tensor of ``shape``, counted
    row-major.

    Args:
        shape: shape of the weight.
        offset: row-major number of the view's first element.
        axes: (size, stride) of each axis of the view; an axis of size one may have any stride.
    Returns:
        None when no sequence of splits, ranges and a permutation gives it.
    """
    strides = [1] * len(shape)
    for k in range(len(shape) - 2, -1, -1):
        strides[k] = strides[k + 1] * shape[k + 1]
    narrows: list[tuple[int, int, int]] = []
    factors: list[int] = []
    ranges: list[tuple[int, int]] = []
    order = [-1] * len(axes)
    for k, (length, unit) in enumerate(zip(shape, strides, strict=True)):
        here = [
            (stride // unit, axis, size)
            for axis, (size, stride) in enumerate(axes)
            if size > 1 and stride % unit == 0 and unit <= stride < unit * length
        ]
        start = offset // unit % length
        split = _split_dim(length, start, sorted(here, reverse=True))
        if split is None:
            return None
        narrow, parts = split
        if narrow is not None:
            narrows.append((k, *narrow))
        for size, first, kept, axis in parts:
            if axis >= 0:
                order[axis] = len(factors)
            factors.append(size)
            ranges.append((first, kept))
    if any(size > 1 and order[axis] < 0 for axis, (size, _) in enumerate(axes)):
        return None
    return View(tuple(narrows), tuple(factors), tuple(ranges), tuple(order), tuple(size for size, _ in axes))


_Part = tuple[int, int, int, int]  # size of the factor, first kept, how many kept, axis or -1


def _split_dim(
    length: int, start: int, axes: list[tuple[int, int, int]]
) -> tuple[tuple[int, int] | None, list[_Part]] | None:
    """Split one dimension into factors for the axes (step, axis, size) that run along it, outermost first."""
    if not axes:
        return None, [(length, start, 1, -1)]
    outer = axes[0][0]
    narrow: tuple[int, int] | None = None
    if length % outer:
        inner = start % outer if start % outer + axes[-1][0] * axes[-1][2] <= outer and len(axes) > 1 else 0
        span = outer * axes[0][2]
        if start - inner + span > length:
            return None
        narrow, start, length = (start - inner, span), inner, span
    parts: list[_Part] = []
    around = length
    for step, axis, size in axes:
        if around % step:
            return None
        first = start % around // step
        if first + size > around // step:
            return None
        parts.append((around // step, first, size, axis))
        around = step
    if around > 1:
        parts.append((around, start % around, 1, -1))
    return narrow, parts
