"""What the kernels of products of heads need of Gluon beyond ``mla_in_python.py``: barriers among other shared memory,
results that leave it, what is written of a token.

A result leaves shared memory as late as it may: when it is waited for. What was written there and not fenced off cannot
leave it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlacompile.kernels.launch import Launch
from tests.kernels import mla_in_python
from tests.kernels.gluon_in_python import Barrier, Barriers, stores
from tests.kernels.mla_in_python import Descriptor, Language, Memory, made


class Room(Memory):
    """Shared memory whose contents can leave."""

    unfenced = False

    def index(self, i: int) -> Room:
        return self._seen(self.at[int(i)])

    def permute(self, order: tuple[int, ...]) -> Room:
        return self._seen(self.at.transpose(order))

    def reshape(self, shape: tuple[int, ...]) -> Room:
        return self._seen(self.at.reshape(shape))

    def _seen(self, at: Any) -> Room:
        return Room(self.raw, self.dtype, at, self.layout)

    def store(self, value: Any) -> None:
        assert not any(self.meets(other) for other, _ in stores()), "written while a result leaves it"
        super().store(value)
        _written.append(self)

    def meets(self, other: Any) -> bool:
        return self.raw is other.raw and bool(np.isin(self.at, other.at).any())


_written: list[Room] = []  # and not fenced off


class HeadsLanguage(Language):
    """What these kernels call ``gl``."""

    div_rn = staticmethod(lambda a, b: made(np.divide(a, b, dtype=np.float32)))
    sqrt_rn = staticmethod(lambda x: made(np.sqrt(x, dtype=np.float32)))
    cdiv = staticmethod(lambda a, b: -(-a // b))

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any) -> Any:
        if str(dtype) == "int64":
            return Barriers(Barrier(0) for _ in range(shape[0]))
        room = mla_in_python._allocate(dtype, shape, layout)
        return Room(room.raw, dtype, room.at, layout)

    @staticmethod
    def static_assert(true: bool) -> None:
        assert true

    @staticmethod
    def device_assert(true: Any, message: str) -> None:
        assert np.all(true), message


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.left = count


def _leave(desc: Descriptor, at: list[Any], source: Room) -> None:
    assert not any(source.meets(other) for other in _written), "leaves without a fence behind what wrote it"
    stores().append((source, lambda: desc.store(at, source)))  # type: ignore[arg-type]


def _store_wait(pendings: int) -> None:
    for _, store in stores():
        store()
    stores().clear()


def run(
    monkeypatch: pytest.MonkeyPatch, modules: list[ModuleType], launch: Launch,
    change: Callable[[dict[str, Any]], None] = lambda replaced: None,
) -> None:  # fmt: skip
    """A launch of a kernel of these modules. change: what of Gluon is to be wrong."""
    (programs,) = launch.grid
    grid = programs, 1, 1
    mla_in_python.install(monkeypatch, modules, grid)
    replaced: dict[str, Any] = {
        "gl": HeadsLanguage(grid), "store_tile": _leave, "tma": SimpleNamespace(store_wait=_store_wait),
        "fence_async_shared": _written.clear,
        "mbarrier": SimpleNamespace(
            init=_init, MBarrierLayout=lambda: None,
            expect=lambda barrier, size: barrier.change(1, int(size)),
            wait=lambda barrier, parity: barrier.wait(parity),
        ),
    }  # fmt: skip
    change(replaced)
    for module in modules:
        for name, value in replaced.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    _written.clear()
    stores().clear()
    mla_in_python.run(launch.kernel, grid, launch.arguments, launch.options["num_warps"])
    assert not stores(), "ends before its results have left"
