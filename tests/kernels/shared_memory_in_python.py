"""Shared memory of a program that runs as Python, and what is asynchronous there, which happens as late as it may.

A product is computed from shared memory when it is waited for, and a result leaves it then, too. What a copy replaces
is gone when the copy is asked for, and what it brings is there when someone waits for it. What was written and not
fenced off is not there for any of them. So a stage that is given back too early, a buffer that is written too early, a
wait or a fence that is left out and a barrier that nobody arrives at are found, as are wrong rows, columns and scales.

Tiles lie in panels as on a GPU, so that looking at them as another type finds the same bytes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as real
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.kernels.partitions_in_python import Barrier, Barriers, here
from tests.kernels.registers_in_python import STORAGE, Numbers, Tensor, from_e4m3, made, size_of, to_e4m3

NAN = np.full(8, 255, np.uint8)  # in all types


class Allocation:
    """Bytes, and what was written there and not fenced off."""

    def __init__(self, size: int) -> None:
        self.bytes = np.resize(NAN, size)
        self.unfenced: dict[tuple[int, ...], Written] = {}


@dataclass
class Written:
    """What a thread has written. told: and then arrived somewhere; before that others do not count on it. fenced: only
    then, which they do not know before it arrives again."""

    memory: Memory
    thread: int
    told: bool = False
    fenced: bool = False


class Memory:
    """A view of shared memory: where each of its elements lies, counted in elements."""

    def __init__(self, room: Allocation, dtype: Any, at: Numbers, layout: Any = None) -> None:
        self.room, self.dtype, self.at, self.layout = room, dtype, at, layout
        self.shape = at.shape

    @classmethod
    def seen(cls, room: Allocation, first: int, dtype: Any, shape: list[int], layout: Any) -> Memory:
        """Bytes from ``first`` on as tiles of that shape, panel after panel."""
        size = size_of(dtype)
        at = np.arange(int(np.prod(shape))) + first // size
        assert first % size == 0
        assert (at.max() + 1) * size <= room.bytes.size, "looks beyond its shared memory"
        if len(shape) > 1 and getattr(layout, "swizzle_byte_width", None):
            *many, rows, columns = shape
            wide = min(layout.swizzle_byte_width // size, columns)
            at = at.reshape(*many, columns // wide, rows, wide).swapaxes(-3, -2)
        elif list(getattr(layout, "order", [])) == [0, 1]:  # columns lie together
            at = at.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-2, -1)
        return cls(room, dtype, at.reshape(shape), layout)

    def index(self, i: Any) -> Memory:
        return self._part(self.at[int(i)])

    def slice(self, start: Any, length: int, dim: int) -> Memory:
        return self._part(self.at.take(range(int(start), int(start) + length), axis=dim))

    def permute(self, order: tuple[int, ...]) -> Memory:
        return self._part(self.at.transpose(order))

    def reshape(self, shape: tuple[int, ...]) -> Memory:
        return self._part(self.at.reshape(shape))

    def _part(self, at: Numbers) -> Memory:
        return Memory(self.room, self.dtype, at, self.layout)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Memory:
        assert self.at.size == self.at.max() + 1 - self.at.min(), "has gaps"
        return Memory.seen(self.room, int(self.at.min()) * size_of(self.dtype), dtype, shape, layout)

    def view(self) -> Numbers:
        return self.room.bytes.view(STORAGE[str(self.dtype)])

    def load(self, layout: Any = None) -> Tensor:
        found = self.view()[self.at]
        return made(from_e4m3(found) if str(self.dtype) == "fp8e4nv" else found)

    def store(self, value: Any) -> None:
        assert np.shape(value) == self.shape
        assert not any(self.meets(other) for other, _ in here.results), "written while a result leaves it"
        self.view()[self.at] = to_e4m3(value) if str(self.dtype) == "fp8e4nv" else np.asarray(value)
        thread = threading.get_ident()
        key = thread, id(self.room), *self._reach(), self.at.size
        self.room.unfenced[key] = here.written[key] = Written(self, thread)

    def meets(self, other: Memory) -> bool:
        """Whether both have a byte in common."""
        (first, end), (other_first, other_end) = self._reach(), other._reach()
        if self.room is not other.room or first >= other_end or other_first >= end:
            return False
        return bool(np.isin(self._bytes(), other._bytes()).any())

    def _reach(self) -> tuple[int, int]:
        """Its first byte, and where it ends."""
        size = size_of(self.dtype)
        return int(self.at.min()) * size, (int(self.at.max()) + 1) * size

    def _bytes(self) -> Numbers:
        size = size_of(self.dtype)
        return self.at[..., None] * size + np.arange(size)

    def assert_fenced(self, what: str) -> None:
        known = [x for x in list(self.room.unfenced.values()) if x.told or x.thread == threading.get_ident()]
        assert not any(self.meets(x.memory) for x in known), f"{what} without a fence behind what wrote it"


def fence() -> None:
    """What this thread has written is there for copies and products, as are barriers that it has begun."""
    for written in here.written.values():
        written.fenced = True
    here.forget(lambda written: not written.told)
    for barrier in here.begun:
        barrier.fenced = True
    here.begun.clear()


def allocate(dtype: Any, shape: list[int], layout: Any) -> Memory | Barriers:
    if str(dtype) == "int64":
        return Barriers.allocated(shape[0])
    return Memory.seen(Allocation(int(np.prod(shape)) * size_of(dtype)), 0, dtype, shape, layout)


class Product:
    """An asynchronous product."""

    type = Tensor.type

    def __init__(self, left: Any, right: Memory, acc: Any, use_acc: bool) -> None:
        self.left, self.right, self.acc, self.use_acc = left, right, acc, use_acc
        self.kind: Any = acc.kind if isinstance(acc, Product) else acc.dtype  # sums in float16 are rounded to it
        self.value: Tensor | None = None

    def compute(self) -> None:
        left = self.left.load() if isinstance(self.left, Memory) else self.left
        # By PyTorch, which two test processes on two cores have told to use one thread.
        factors = (torch.from_numpy(np.asarray(x, np.float64)) for x in (left, self.right.load()))
        value = torch.matmul(*factors).numpy()
        if self.use_acc:
            value = value + np.asarray(self.acc.value if isinstance(self.acc, Product) else self.acc)
        self.value = made(value.astype(np.float32).astype(self.kind))


def begin(left: Any, right: Memory, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    for factor in (left, right):
        if isinstance(factor, Memory):
            factor.assert_fenced("is multiplied")
    product = Product(left, right, acc, use_acc)
    here.products.append(product)
    return product if is_async else wait(0, (product,))


def wait(pendings: int, deps: tuple[Any, ...]) -> Any:
    """For all products that this thread has begun but so many."""
    while len(here.products) > pendings:
        here.products.pop(0).compute()
    known = [x.value if isinstance(x, Product) and x.value is not None else x for x in deps]
    return known[0] if len(known) == 1 else known


class Descriptor:
    """A matrix, or a line, of which boxes are copied: zeros beyond its edges, and nothing is written there."""

    def __init__(self, described: TensorDescriptor) -> None:
        base, strides = described.base, [int(x) for x in described.strides]
        self.dtype = {1: real.float8e4nv, 2: real.float16, 4: real.float32}[base.element_size()]
        raw = base.view(torch.uint8) if base.element_size() == 1 else base
        self.array = raw.as_strided([int(x) for x in described.shape], strides).numpy()
        self.block_type = SimpleNamespace(shape=[int(x) for x in described.block_shape])
        self.layout = described.layout

    def load(self, at: list[Any], barrier: Barrier, to: Memory) -> None:
        view = to.room.bytes.view(self.array.dtype)

        def copy() -> None:
            found = self.array[self._inside(at, to)]
            whole = np.zeros(to.shape, self.array.dtype)
            whole[tuple(slice(n) for n in found.shape)] = found
            view[to.at] = whole
            barrier.change(0, -whole.nbytes)

        to.assert_fenced("is replaced")
        view[to.at] = NAN.view(self.array.dtype)[0]
        barrier.later(copy)

    def store(self, at: list[Any], source: Memory) -> None:
        """When it is waited for."""

        def leave() -> None:
            target = self.array[self._inside(at, source)]
            kept = source.at[tuple(slice(n) for n in target.shape)]
            target[...] = source.room.bytes.view(target.dtype)[kept]

        source.assert_fenced("leaves")
        here.results.append((source, leave))

    def _inside(self, at: list[Any], of: Memory) -> tuple[slice, ...]:
        return tuple(slice(int(i), int(i) + n) for i, n in zip(at, of.shape, strict=True))


def store_wait(pendings: int) -> None:
    """For all results that this thread has sent but so many."""
    while len(here.results) > pendings:
        _, leave = here.results.pop(0)
        leave()
