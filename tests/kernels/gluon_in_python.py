"""Just enough of Gluon in plain Python to run Hopper kernels: a launch's own kernel, grid and arguments.

Programs run one after the other, the partitions of a program as threads (``partitions_in_python.py``). What of it is
asynchronous is in ``shared_memory_in_python.py``.
"""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.experimental.gluon import language as real
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlacompile.kernels.launch import Launch
from tests.kernels import shared_memory_in_python as shared
from tests.kernels.assembly_in_python import assembly
from tests.kernels.partitions_in_python import Barrier, Program, here, specialize
from tests.kernels.registers_in_python import STORAGE, Pointer, Tensor, load, made, spoil, store

Change = Callable[[dict[str, Any]], None]


def _scalar_or(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *args: made(function(*args))


class Language:
    """What the kernel calls ``gl``; names of types and layouts are the real ones."""

    def __init__(self, grid: tuple[int, ...]) -> None:
        self.grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    minimum, maximum = staticmethod(_scalar_or(np.minimum)), staticmethod(_scalar_or(np.fmax))
    abs, where = staticmethod(_scalar_or(np.abs)), staticmethod(_scalar_or(np.where))
    exp2, log2 = staticmethod(_scalar_or(np.exp2)), staticmethod(_scalar_or(np.log2))
    div_rn = staticmethod(lambda a, b: made(np.divide(a, b, dtype=np.float32)))
    sqrt_rn = staticmethod(lambda x: made(np.sqrt(x, dtype=np.float32)))
    rsqrt = staticmethod(lambda x: made(1 / np.sqrt(x)))
    cdiv = staticmethod(lambda a, b: -(-a // b))
    sum = staticmethod(lambda x, axis: made(np.sum(x, axis)))
    max = staticmethod(lambda x, axis: made(np.fmax.reduce(x, axis)))
    min = staticmethod(lambda x, axis: made(np.min(x, axis)))
    reduce = staticmethod(lambda x, axis, combine: functools.reduce(combine, np.moveaxis(x, axis, 0)))
    associative_scan = staticmethod(lambda x, axis, combine: made(np.cumsum(x, axis)))
    arange = staticmethod(lambda begin, end, layout=None: made(np.arange(int(begin), int(end))))
    zeros = staticmethod(lambda shape, dtype, layout=None: made(np.zeros(shape, STORAGE[str(dtype)])))
    full = staticmethod(
        lambda shape, value, dtype, layout=None: made(np.full([int(n) for n in shape], value, STORAGE[str(dtype)]))
    )
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    split = staticmethod(lambda x: (made(x[..., 0]), made(x[..., 1])))
    join = staticmethod(lambda a, b: made(np.stack([a, b], -1)))
    broadcast = staticmethod(lambda a, b: tuple(made(x.copy()) for x in np.broadcast_arrays(a, b)))
    reshape = staticmethod(lambda x, shape: made(np.reshape(x, shape)))
    expand_dims = staticmethod(lambda x, axis: made(np.expand_dims(x, axis)))
    to_tensor = staticmethod(made)
    num_warps, static_range = staticmethod(lambda: here.warps), range
    load, store = staticmethod(load), staticmethod(store)
    allocate_shared_memory = staticmethod(shared.allocate)
    inline_asm_elementwise = staticmethod(assembly)
    program_id = staticmethod(lambda axis: made(here.program.at[axis]))
    warp_specialize = staticmethod(specialize)

    def num_programs(self, axis: int) -> Tensor:
        return made(self.grid[axis])

    @staticmethod
    def static_assert(true: bool) -> None:
        assert true

    @staticmethod
    def device_assert(true: Any, message: str) -> None:
        assert np.all(true), message


def _aggregate(kind: Any) -> Callable[..., SimpleNamespace]:
    """Of the same fields as an aggregate of Gluon."""
    (init,) = kind.hash_attrs
    fields = list(inspect.signature(init.fn).parameters)[1:]
    return lambda *args: SimpleNamespace(**dict(zip(fields, args, strict=True)))


def install(
    monkeypatch: pytest.MonkeyPatch, modules: list[ModuleType], grid: tuple[int, ...],
    change: Change = lambda replaced: None,
) -> None:  # fmt: skip
    """Let the functions of the kernel's modules run as Python. change: what of Gluon is to be wrong."""
    replaced: dict[str, Any] = {
        "gl": Language(grid), "warpgroup_mma": shared.begin, "warpgroup_mma_wait": shared.wait,
        "fence_async_shared": shared.fence,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=Barrier.init, expect=Barrier.expect, arrive=Barrier.arrive, wait=Barrier.wait,
        ),
        "tma": SimpleNamespace(store_wait=shared.store_wait),
        "load_tile": lambda desc, at, barrier, to: desc.load(at, barrier, to),
        "store_tile": lambda desc, at, source: desc.store(at, source),
        "_drop": spoil, "_here": lambda x: x,
        "_declare_any": lambda side: None, "_any_thread": lambda x, side: bool(np.any(x)),
        **dict.fromkeys(("_launch_later", "_wait_for_earlier", "all_warps"), lambda: None),
    }  # fmt: skip
    change(replaced)
    for module in modules:
        for name, value in list(vars(module).items()):
            if name in replaced:
                monkeypatch.setattr(module, name, replaced[name])
            elif hasattr(value, "hash_attrs"):
                monkeypatch.setattr(module, name, _aggregate(value))
            elif isinstance(value, real.constexpr):
                monkeypatch.setattr(module, name, value.value)
            elif callable(getattr(value, "fn", None)):
                monkeypatch.setattr(module, name, value.fn)
                defaults = tuple(getattr(x, "value", x) for x in value.fn.__defaults__ or ())
                monkeypatch.setattr(value.fn, "__defaults__", defaults or None)
            elif hasattr(value, "__wrapped__") and name.startswith("_"):
                monkeypatch.setattr(module, name, value.__wrapped__)


def _argument(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return shared.Descriptor(x)
    if isinstance(x, torch.Tensor):
        whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        return Pointer((whole.view(torch.uint8) if x.itemsize == 1 else whole).numpy(), x.storage_offset())
    return made(x) if type(x) is int else x


def run(modules: list[ModuleType], launch: Launch, change: Change = lambda replaced: None) -> None:
    """A launch of a kernel of these modules: every program, one after the other."""
    grid = *launch.grid, *(1,) * (3 - len(launch.grid))
    kernel, arguments, num_warps = launch.kernel, launch.arguments, launch.options["num_warps"]
    made_once = {name: _argument(x) for name, x in arguments.items()}
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr and p.name in arguments}
    with pytest.MonkeyPatch.context() as patched, np.errstate(all="ignore"):
        install(patched, modules, grid, change)
        for at in np.ndindex(*grid):
            here.begin(Program(at), num_warps)
            kernel.fn(**{**made_once, **constants}, num_warps=num_warps)
            here.ended()


def dawdle(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let every partition be late at times: with memory, with products and with copies."""
    chance = random.Random(seed)

    def late(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **settings: Any) -> Any:
            if chance.random() < 0.2:
                time.sleep(0.004 * chance.random())
            return method(*args, **settings)

        return wrapped

    memory, product, descriptor = shared.Memory, shared.Product, shared.Descriptor
    for owner, name in ((memory, "load"), (memory, "store"), (product, "compute"), (descriptor, "load")):
        monkeypatch.setattr(owner, name, late(getattr(owner, name)))
