"""Just enough of Gluon in plain Python to run the Hopper kernels of ``fp8_linear``: their partitions as threads.

What is asynchronous on a GPU happens as late as it may here: a product is computed from shared memory when it is waited
for, and a result leaves shared memory then, too. What a copy replaces is gone when the copy is asked for, and what it
brings is there when someone waits for it. So a stage that is given back too early, a buffer that is written too early,
a wait that is left out and a barrier that nobody arrives at are found, as are wrong rows, columns and scales.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

PATIENCE = 20.0  # seconds until a wait counts as endless
_here = threading.local()


class Array(np.ndarray):  # type: ignore[type-arg]
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Array:
        return self


class Number(int):
    def to(self, dtype: Any) -> int:
        return int(self)


class Pointer:
    def __init__(self, array: np.ndarray[Any, Any], offset: Any = 0) -> None:
        self.array, self.offset = array, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + offset)


class Memory:
    """Shared memory."""

    dtype = None

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def index(self, i: int) -> Memory:
        return Memory(self.array[i])

    def slice(self, start: int, length: int, dim: int) -> Memory:
        assert dim == 0
        return Memory(self.array[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.array.transpose(order))

    def store(self, value: np.ndarray[Any, Any]) -> None:
        assert not any(np.shares_memory(self.array, source) for source, _ in stores()), (
            "written while a result leaves it"
        )
        self.array[...] = value


class Barrier:
    def __init__(self, count: int) -> None:
        self.count, self.left, self.bytes, self.phase = count, count, 0, 0
        self.changed = threading.Condition()
        self.coming: list[Callable[[], None]] = []

    def change(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.left -= arrivals
            self.bytes += size
            assert self.left >= 0, "more arrive than should"
            if self.left == self.bytes == 0:
                self.left, self.phase = self.count, self.phase + 1
            self.changed.notify_all()

    def later(self, copy: Callable[[], None]) -> None:
        """Copy when someone waits here."""
        with self.changed:
            self.coming.append(copy)
            self.changed.notify_all()

    def _passed(self, parity: int) -> bool:
        while self.phase & 1 == parity and self.coming:
            self.coming.pop(0)()
        return self.phase & 1 != parity

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self._passed(parity), PATIENCE), "waits for what never comes"


class Barriers(list):  # type: ignore[type-arg]
    def index(self, i: int) -> Barrier:  # type: ignore[override]
        return self[i]  # type: ignore[no-any-return]


class Descriptor:
    """A matrix, of which blocks are copied: zeros beyond its edges, and nothing is written there."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def _inside(self, at: list[int], shape: tuple[int, ...]) -> tuple[slice, slice]:
        return slice(at[0], at[0] + shape[0]), slice(at[1], at[1] + shape[1])

    def load(self, at: list[int], barrier: Barrier, to: Memory) -> None:
        def copy() -> None:
            found = self.array[self._inside(at, to.array.shape)]
            to.array[...] = 0
            to.array[: found.shape[0], : found.shape[1]] = found
            barrier.change(0, -to.array.size)

        to.array[...] = np.nan
        barrier.later(copy)

    def store(self, at: list[int], source: Memory) -> None:
        target = self.array[self._inside(at, source.array.shape)]
        target[...] = source.array[: target.shape[0], : target.shape[1]]


def stores() -> list[tuple[np.ndarray[Any, Any], Callable[[], None]]]:
    """What this thread has sent and not waited for: from where, and how."""
    if not hasattr(_here, "stores"):
        _here.stores = []
    return _here.stores  # type: ignore[no-any-return]


def _store_wait(pendings: int) -> None:
    for _, store in stores():
        store()
    stores().clear()


def _load(p: Pointer) -> Array:
    return p.array[np.asarray(p.offset)].view(Array)


def _store(p: Pointer, value: Array, mask: Array) -> None:
    mask = np.broadcast_to(mask, value.shape)
    p.array[np.asarray(p.offset)[mask]] = value[mask]


def _begun(left: Memory, right: Memory, acc: Any, *, use_acc: bool, is_async: bool) -> Callable[[], Array]:
    assert is_async
    assert not use_acc
    return lambda: (left.array @ right.array).view(Array)


def _waited(pendings: int, deps: Sequence[Callable[[], Array]]) -> Any:
    found = [product() for product in deps]
    return found if len(found) > 1 else found[0]


def install(monkeypatch: pytest.MonkeyPatch, kernel: ModuleType, programs: int, own: Sequence[str]) -> None:
    """Let the functions of the kernel's module run as Python. own: those that its partitions call."""
    gl = SimpleNamespace(
        minimum=np.minimum, where=np.where, rsqrt=lambda x: 1 / np.sqrt(x), load=_load, store=_store,
        float32=None, int64=None,
        arange=lambda start, end, layout: np.arange(start, end).view(Array),
        zeros=lambda shape, dtype, layout: np.zeros(shape).view(Array),
        SliceLayout=lambda *args: None, NVMMADistributedLayout=lambda **kwargs: None,
        program_id=lambda axis: _here.program, num_programs=lambda axis: programs, static_range=range,
        convert_layout=lambda x, layout: x,
    )  # fmt: skip
    functions = {name: getattr(kernel, name).fn for name in own}
    if item := functions.get("_item"):
        functions["_item"] = lambda *args: tuple(Number(x) for x in item(*args))
    sizes = {
        name: int(getattr(kernel, name)) for name in ("BLOCK_K", "ROWS", "COLUMNS", "BURST") if hasattr(kernel, name)
    }
    replaced = {
        "gl": gl,
        "mbarrier": SimpleNamespace(
            wait=lambda barrier, parity: barrier.wait(parity),
            expect=lambda barrier, size: barrier.change(1, size),
            arrive=lambda barrier, count: barrier.change(count, 0),
        ),
        "tma": SimpleNamespace(store_wait=_store_wait), "fence_async_shared": lambda: None,
        "load_tile": lambda desc, at, barrier, to: desc.load(at, barrier, to),
        "store_tile": lambda desc, at, source: stores().append((source.array, lambda: desc.store(at, source))),
        "warpgroup_mma": _begun, "warpgroup_mma_wait": _waited,
        "_here": lambda x: x, "_launch_later": lambda: None,
        "_added": lambda acc, block, factor: acc + block * factor[:, None],
        **sizes,
        **functions,
    }  # fmt: skip
    for name, value in replaced.items():
        assert hasattr(kernel, name)
        monkeypatch.setattr(kernel, name, value)


def at_once(partitions: list[Callable[[], None]]) -> None:
    """The partitions of a program, each in a thread; raises what the first that fails has raised."""
    failed: list[BaseException] = []

    def guarded(partition: Callable[[], None]) -> None:
        try:
            partition()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(partition,), daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def run(program: int, partitions: list[Callable[[], None]]) -> None:
    """One program: its partitions at once."""

    def one(partition: Callable[[], None]) -> None:
        _here.program = program
        partition()
        assert not stores(), "ends before its results have left"

    at_once([partial(one, partition) for partition in partitions])
