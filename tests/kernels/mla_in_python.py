"""Just enough of Gluon in plain Python to run the Hopper kernels of ``mla_decode``: their partitions as threads.

As in ``gluon_in_python.py`` a product is computed from shared memory as late as it may be: when it is waited for. Tiles
of shared memory lie in panels as on a GPU, so that looking at them as another type finds the same bytes. Layouts of
registers do not exist here; that conversions between them move nothing is for the compiler to say.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.experimental.gluon import language as real
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlacompile.kernels.mla_decode import hopper_launch, hopper_rows
from mlacompile.kernels.mla_decode.hopper_launch import hopper_launches
from mlacompile.kernels.mla_decode.plan import HopperPlan
from mlacompile.testing.latents import LatentInputs
from tests.kernels.gluon_in_python import Barrier, Barriers, at_once, stores

Numbers = np.ndarray[Any, Any]
STORAGE = {
    "fp8e4nv": np.uint8, "fp16": np.float16, "fp32": np.float32, "int16": np.int16, "int32": np.int32,
    "int64": np.int64, "uint32": np.uint32,
}  # fmt: skip
TYPES = (real.float8e4nv, real.float16, real.float32, real.int32, real.int64)
_here = threading.local()


def from_e4m3(x: Numbers) -> Numbers:
    return torch.from_numpy(np.ascontiguousarray(x)).view(torch.float8_e4m3fn).float().numpy()


def to_e4m3(x: Numbers) -> Numbers:
    """Rounded, and ended at the largest value, as the GPU does."""
    kept = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).clamp(-448, 448)
    return kept.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def of_words(words: Any, kind: torch.dtype) -> torch.Tensor:
    """The two numbers of each word."""
    return torch.from_numpy(np.ascontiguousarray(words)).view(kind).view(*np.shape(words), 2)


def to_words(numbers: torch.Tensor) -> Tensor:
    return made(numbers.contiguous().view(torch.int32)[..., 0].numpy())


class Tensor(np.ndarray):  # type: ignore[type-arg]
    """A tensor in registers; values of FP8 as float32."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        storage = STORAGE[str(dtype)]
        if bitcast:
            return made(np.asarray(self).view(storage))
        if str(dtype) == "fp8e4nv":
            return made(from_e4m3(to_e4m3(self)))
        return made(np.asarray(self).astype(storage))

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[override,misc]
        return made(self + other)  # what others hold stays as it is

    def __isub__(self, other: Any) -> Tensor:  # type: ignore[override,misc]
        return made(self - other)

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[override,misc]
        return made(self * other)

    def permute(self, order: tuple[int, ...]) -> Tensor:
        return made(self.transpose(order))

    def split(self) -> tuple[Tensor, Tensor]:
        return self[..., 0], self[..., 1]

    def __getitem__(self, at: Any) -> Any:
        return made(np.asarray(super().__getitem__(at)))


def made(x: Any) -> Tensor:
    return np.asarray(x).view(Tensor)


class Pointer:
    def __init__(self, array: Numbers, offset: Any = 0) -> None:
        self.array, self.offset = array, offset
        self.dtype = SimpleNamespace(element_ty=next(x for x in TYPES if STORAGE[str(x)] == array.dtype))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + offset)


class Memory:
    """A view of shared memory: where each of its elements lies, counted in elements, in one array of bytes."""

    def __init__(self, raw: Numbers, dtype: Any, at: Numbers, layout: Any = None) -> None:
        self.raw, self.dtype, self.at, self.layout = raw, dtype, at, layout
        self.shape = at.shape

    @classmethod
    def seen(cls, raw: Numbers, first: int, dtype: Any, shape: list[int], layout: Any) -> Memory:
        """Bytes from ``first`` on as tiles of that shape, panel after panel."""
        size = np.dtype(STORAGE[str(dtype)]).itemsize
        at = np.arange(int(np.prod(shape))) + first // size
        assert first % size == 0
        assert (at.max() + 1) * size <= raw.size, "looks beyond its shared memory"
        if len(shape) > 1 and getattr(layout, "swizzle_byte_width", 0):
            *many, rows, columns = shape
            wide = min(layout.swizzle_byte_width // size, columns)
            at = at.reshape(*many, columns // wide, rows, wide).swapaxes(-3, -2)
        elif list(getattr(layout, "order", [])) == [0, 1]:  # columns lie together
            at = at.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-2, -1)
        return cls(raw, dtype, at.reshape(shape), layout)

    def index(self, i: int) -> Memory:
        return Memory(self.raw, self.dtype, self.at[int(i)], self.layout)

    def slice(self, start: int, length: int, dim: int) -> Memory:
        some = self.at.take(range(int(start), int(start) + length), axis=dim)
        return Memory(self.raw, self.dtype, some, self.layout)

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.raw, self.dtype, self.at.transpose(order), self.layout)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Memory:
        size = np.dtype(STORAGE[str(self.dtype)]).itemsize
        assert self.at.size == self.at.max() + 1 - self.at.min(), "has gaps"
        return Memory.seen(self.raw, int(self.at.min()) * size, dtype, shape, layout)

    def load(self, layout: Any = None) -> Tensor:
        found = self.raw.view(STORAGE[str(self.dtype)])[self.at]
        return made(from_e4m3(found) if str(self.dtype) == "fp8e4nv" else found)

    def store(self, value: Any) -> None:
        assert np.shape(value) == self.shape
        value = to_e4m3(value) if str(self.dtype) == "fp8e4nv" else np.asarray(value)
        self.raw.view(STORAGE[str(self.dtype)])[self.at] = value


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Memory:
    size = np.dtype(STORAGE[str(dtype)]).itemsize
    raw = np.full(int(np.prod(shape)) * size, 255, np.uint8)  # NaN in all types
    return Memory.seen(raw, 0, dtype, shape, layout)


class Product:
    """An asynchronous product."""

    type = Tensor.type

    def __init__(self, left: Any, right: Memory, acc: Any, use_acc: bool) -> None:
        self.left, self.right, self.acc, self.use_acc = left, right, acc, use_acc
        self.kind: Any = acc.kind if isinstance(acc, Product) else acc.dtype  # sums in float16 are rounded to it
        self.value: Tensor | None = None

    def compute(self) -> None:
        left = self.left.load() if isinstance(self.left, Memory) else self.left
        value = np.asarray(left, np.float64) @ np.asarray(self.right.load(), np.float64)
        if self.use_acc:
            value = value + np.asarray(self.acc.value if isinstance(self.acc, Product) else self.acc)
        self.value = made(value.astype(np.float32).astype(self.kind))


def _products() -> list[Product]:
    """What this thread has begun and not waited for."""
    if not hasattr(_here, "products"):
        _here.products = []
    return _here.products  # type: ignore[no-any-return]


def _begin(left: Any, right: Memory, acc: Any, *, use_acc: bool = True, is_async: bool) -> Any:
    product = Product(left, right, acc, use_acc)
    _products().append(product)
    return product if is_async else _wait(0, (product,))


def _wait(pendings: int, deps: tuple[Any, ...]) -> Any:
    begun = _products()
    while len(begun) > pendings:
        begun.pop(0).compute()
    known = [x.value if isinstance(x, Product) and x.value is not None else x for x in deps]
    return known[0] if len(known) == 1 else known


def _load(p: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    at = np.asarray(p.offset)
    if mask is None:
        return made(p.array[at])
    return made(np.where(mask, p.array[np.where(mask, at, 0)], np.asarray(other, p.array.dtype)))


def _store(p: Pointer, value: Any, mask: Any = None) -> None:
    at = np.asarray(p.offset)
    value = to_e4m3(value) if p.array.dtype == np.uint8 else value
    if mask is None:
        p.array[at] = value
    else:
        shape = np.broadcast_shapes(at.shape, np.shape(mask))
        mask = np.broadcast_to(mask, shape)
        p.array[np.broadcast_to(at, shape)[mask]] = np.broadcast_to(value, shape)[mask]


def _spoil(p: Pointer, mask: Any) -> None:
    """In place of dropping lines: who reads them later finds NaN."""
    at = np.broadcast_to(np.asarray(p.offset), np.shape(mask))[np.asarray(mask)]
    assert (at * p.array.itemsize % 128 == 0).all(), "a line begins there"
    p.array[at[:, None] + np.arange(128 // p.array.itemsize)] = np.nan


def _assembly(code: str, constraints: str, args: list[Any], dtype: Any = None, **_: Any) -> Any:
    if "{a0, a1}" in code:  # four FP8 values to two words of float16, times a factor
        kind = torch.float8_e5m2 if "e5m2" in code else torch.float8_e4m3fn
        words = np.ascontiguousarray(args[0])
        values = torch.from_numpy(words.view(np.uint8)).view(kind).half().view(*words.shape, 4)
        if len(args) > 1:
            factors = torch.from_numpy(np.ascontiguousarray(args[1]).view(np.float16)).view(*words.shape, 2)
            values = values * factors.repeat(1, 1, 2)
        return tuple(made(half.contiguous().numpy().view(np.int32)[..., 0]) for half in values.split(2, -1))
    if "sub.f16x2" in code:  # a number in e4m3, and what that leaves of it
        high = from_e4m3(to_e4m3(args[0]))
        rest = np.asarray(args[0]).astype(np.float16).astype(np.float32) - high
        rest = rest * (16 if "mul.rn.f16x2" in code else 1)
        return made(high), made(from_e4m3(to_e4m3(rest)))
    if "mov.b32 $1, $2" in code:  # the word of two neighbours, in place of both
        low, high = (np.asarray(args[0]).astype(np.uint16).astype(np.uint32)[..., i::2] for i in (0, 1))
        return made(np.repeat(low | high << 16, 2, -1).view(np.int32))
    words_in_place_of_both = np.asarray(args[0]).dtype == np.int32
    if words_in_place_of_both and any(x in code for x in ("e4m3x2", "0x6420", "0x6240")):
        words = np.asarray(args[0]).view(np.uint32)
        pairs = np.where(np.arange(words.shape[-1]) % 2, words >> 16, words & 0xFFFF)
        times = np.asarray(args[1]) if len(args) > 1 else np.float16(1)
        if "0x6240" in code:  # of four tokens the third comes second
            pairs = pairs.reshape(*pairs.shape[:-1], -1, 4)[..., [0, 2, 1, 3]].reshape(pairs.shape)
        halves = (from_e4m3(((pairs >> shift) & 255).astype(np.uint8)).astype(np.float16) for shift in (0, 8))
        return tuple(made(half * times) for half in halves)
    if "fma.rn.f16x2 $0" in code:  # the same of a group of columns, added to those before
        return made((args[0] + args[1] * np.float16(1 / 16)) * args[2] + args[3])
    if "mul.rn.f16x2 x, $2, $3" in code:  # and the sum of groups
        return made((args[0] * args[1]).astype(np.float32))
    if "fma.rn.f16x2" in code:  # sums of both parts of a query
        return made(((args[0] + args[1] * np.float16(1 / 16)) * args[2]).astype(np.float32))
    if "shfl.sync.bfly" in code:  # a thread keeps one of two words and puts what another has of it to that
        kind, put = (torch.bfloat16, torch.fmax) if "max.bf16x2" in code else (torch.float16, torch.add)
        first, second = (of_words(x, kind) for x in args[:2])
        high = torch.from_numpy(np.asarray(args[2])[:, :1, None] != 0)
        distance = int(re.search(r"given, given, (\d+)", code)[1]) // 4  # type: ignore[index]
        other = np.arange(len(high)) ^ distance
        return to_words(torch.where(high, put(second, second[other]), put(first, first[other])))
    if "x2.f32 $0, $2, $1" in code and "e4m3" not in code:  # two numbers to a word
        kind = torch.bfloat16 if "bf16x2" in code else torch.float16
        return to_words(torch.from_numpy(np.stack([np.asarray(x) for x in args], -1)).to(kind))
    if "0xffff0000" in code or code.startswith("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32"):  # and back
        both = of_words(args[0], torch.bfloat16 if "0xffff0000" in code else torch.float16).float().numpy()
        return tuple(made(np.ascontiguousarray(x)) for x in np.moveaxis(both, -1, 0))
    if "e4m3x2.f32 $0, $2, $1" in code:  # two numbers to a pair of FP8 values
        low, high = (to_e4m3(x).astype(np.uint16) for x in args)
        return made((low | high << 8).view(np.int16))
    if "e4m3x2" in code:  # pairs of FP8 values to float16
        pairs = np.asarray(args[0])
        return tuple(made(from_e4m3(((pairs >> shift) & 255).astype(np.uint8))) for shift in (0, 8))
    if "rcp.approx" in code:
        return made(np.float32(1) / args[0])
    if "griddepcontrol" in code:
        return None
    assert "mov.b32" in code
    return args[0]


def _scalar_or(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *args: made(function(*args))


class Language:
    """What the kernel calls ``gl``; names of types and layouts are the real ones."""

    def __init__(self, grid: tuple[int, int, int]) -> None:
        self.grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    minimum, maximum = staticmethod(_scalar_or(np.minimum)), staticmethod(_scalar_or(np.fmax))
    abs, where = staticmethod(_scalar_or(np.abs)), staticmethod(_scalar_or(np.where))
    exp2, log2 = staticmethod(_scalar_or(np.exp2)), staticmethod(_scalar_or(np.log2))
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
    num_warps, static_range = staticmethod(lambda: _here.warps), range
    load, store = staticmethod(_load), staticmethod(_store)
    allocate_shared_memory = staticmethod(_allocate)
    inline_asm_elementwise = staticmethod(_assembly)
    program_id = staticmethod(lambda axis: made(_here.program[axis]))
    warp_specialize = staticmethod(lambda *args: _specialize(*args))

    def num_programs(self, axis: int) -> Tensor:
        return made(self.grid[axis])


class Descriptor:
    """A matrix, or a line, of which boxes are copied: zeros beyond its edges."""

    def __init__(self, described: TensorDescriptor) -> None:
        base, strides = described.base, [int(x) for x in described.strides]
        self.dtype = {1: real.float8e4nv, 2: real.float16, 4: real.float32}[base.element_size()]
        raw = base.view(torch.uint8) if base.element_size() == 1 else base
        self.array = raw.as_strided([int(x) for x in described.shape], strides).numpy()
        self.block_type = SimpleNamespace(shape=[int(x) for x in described.block_shape])
        self.layout = described.layout

    def load(self, at: list[Any], barrier: Barrier, to: Memory) -> None:
        def copy() -> None:
            found = self.array[self._inside(at, to)]
            whole = np.zeros(to.shape, self.array.dtype)
            whole[tuple(slice(n) for n in found.shape)] = found
            to.raw.view(whole.dtype)[to.at] = whole
            barrier.change(0, -whole.nbytes)

        to.raw.view(self.array.dtype)[to.at] = np.full(8, 255, np.uint8).view(self.array.dtype)[0]
        barrier.later(copy)

    def store(self, at: list[Any], source: Memory) -> None:
        target = self.array[self._inside(at, source)]
        target[...] = source.raw.view(target.dtype)[source.at[tuple(slice(n) for n in target.shape)]]

    def _inside(self, at: list[Any], of: Memory) -> tuple[slice, ...]:
        return tuple(slice(int(i), int(i) + n) for i, n in zip(at, of.shape, strict=True))


def _barriers(count: int, arrivals: int = 1) -> Any:
    made_ = Barriers(Barrier(arrivals) for _ in range(count))
    return made_ if count > 1 else made_[0]


def _aggregate(kind: Any) -> Callable[..., SimpleNamespace]:
    """Of the same fields as an aggregate of Gluon."""
    (init,) = kind.hash_attrs
    fields = list(inspect.signature(init.fn).parameters)[1:]
    return lambda *args: SimpleNamespace(**dict(zip(fields, args, strict=True)))


def install(monkeypatch: pytest.MonkeyPatch, modules: list[ModuleType], grid: tuple[int, int, int]) -> None:
    """Let the functions of the kernel's modules run as Python."""
    replaced = {
        "gl": Language(grid), "warpgroup_mma": _begin, "warpgroup_mma_wait": _wait, "fence_async_shared": lambda: None,
        "mbarrier": SimpleNamespace(
            wait=lambda barrier, parity: barrier.wait(int(parity)),
            expect=lambda barrier, size: barrier.change(1, size),
            arrive=lambda barrier, count: barrier.change(count, 0),
        ),
        "load_tile": lambda desc, at, barrier, to: desc.load(at, barrier, to), "_barriers": _barriers,
        "_drop": _spoil, "_here": lambda x: x,
        "_declare_any": lambda side: None, "_any_thread": lambda x, side: bool(np.any(x)),
        **dict.fromkeys(("_launch_later", "_wait_for_earlier", "all_warps"), lambda: None),
    }  # fmt: skip
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


def moved_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What ``_moved`` will find, bit by bit, for every block and partition that asks."""
    found: list[int] = []
    moved = hopper_rows._moved.fn

    def recorded(alpha: Any) -> Any:
        groups = moved(alpha)
        found.append(int(groups))
        return groups

    monkeypatch.setattr(hopper_rows._moved, "fn", recorded)
    return found


def dawdle(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let every partition be late at times: with memory, with products and with copies."""
    chance = random.Random(seed)

    def late(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **settings: Any) -> Any:
            if chance.random() < 0.2:
                time.sleep(0.004 * chance.random())
            return method(*args, **settings)

        return wrapped

    for owner, name in ((Memory, "load"), (Memory, "store"), (Product, "compute"), (Descriptor, "load")):
        monkeypatch.setattr(owner, name, late(getattr(owner, name)))


def run(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], num_warps: int = 4) -> None:
    """Every program of a launch, one after the other: its partitions at once."""

    def argument(x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return Descriptor(x)
        if isinstance(x, torch.Tensor):
            whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
            return Pointer((whole.view(torch.uint8) if x.itemsize == 1 else whole).numpy(), x.storage_offset())
        return made(x) if type(x) is int else x

    made_once = {name: argument(x) for name, x in arguments.items()}
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr and p.name in arguments}
    _here.warps = num_warps
    for _here.program in np.ndindex(*grid):
        with np.errstate(all="ignore"):
            kernel.fn(**{**made_once, **constants}, num_warps=num_warps)


def _specialize(
    partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    program = _here.program

    def one(function: Callable[..., None], args: tuple[Any, ...], warps: int) -> None:
        _here.program, _here.warps = program, warps
        with np.errstate(all="ignore"):
            function(*args)
        assert not _products(), "ends before its products are waited for"
        assert not stores(), "ends before its results have left"

    assert len(warps) == len(registers) == len(partitions) - 1
    at_once([partial(one, *partition, n) for partition, n in zip(partitions, [4, *warps], strict=True)])


def decode(
    monkeypatch: pytest.MonkeyPatch, modules: list[ModuleType], inputs: LatentInputs, plan: HopperPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mla_decode`` by the kernel of these modules, and the merge. What is not written is NaN."""
    q_latent, q_pe, c_kv, k_pe, _, start, length, table, descale, *_ = (*inputs.tensors, None, None)
    assert q_latent is not None
    tensors = (q_latent, q_pe, c_kv, k_pe, start, length, table, descale)
    out = torch.full(q_latent.shape, math.nan, dtype=q_latent.dtype)
    lse = torch.full(q_latent.shape[:3], math.nan)
    # Memory of a CPU begins anywhere.
    monkeypatch.setattr(hopper_launch, "in_whole_lines", lambda t: t.stride(0) * t.itemsize % 128 == 0)
    launches = hopper_launches(tensors, out, lse, plan, **inputs.keywords)
    for name in ("p_part", "p_part_lse"):
        launches[0].arguments[name].view(torch.uint8).fill_(255)
    for launch in launches:
        install(monkeypatch, modules, launch.grid)
        run(launch.kernel, launch.grid, launch.arguments, launch.options["num_warps"])
    return out, lse
