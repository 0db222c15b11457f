"""What a thread of a kernel that runs as Python has: tensors in registers, pointers to global memory.

Values of FP8 are float32 in registers and bytes in memory. Layouts of registers do not exist here; that conversions
between them move nothing is for the compiler to say.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as real

Numbers = np.ndarray[Any, Any]
STORAGE = {
    "fp8e4nv": np.uint8, "fp16": np.float16, "fp32": np.float32, "int16": np.int16, "int32": np.int32,
    "int64": np.int64, "uint32": np.uint32,
}  # fmt: skip
TYPES = (real.float8e4nv, real.float16, real.float32, real.int32, real.int64)
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def size_of(dtype: Any) -> int:
    """Bytes of a number."""
    return np.dtype(STORAGE[str(dtype)]).itemsize


def from_e4m3(x: Numbers) -> Numbers:
    return _E4M3[x]


def to_e4m3(x: Any) -> Numbers:
    """Rounded, and ended at the largest value, as the GPU does."""
    kept = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).clamp(-448, 448)
    return kept.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


class Tensor(np.ndarray[Any, Any]):
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        storage = STORAGE[str(dtype)]
        if bitcast:
            return made(np.asarray(self).view(storage))
        if str(dtype) == "fp8e4nv":
            return made(from_e4m3(to_e4m3(self)))
        return made(np.asarray(self).astype(storage))

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return made(self + other)  # what others hold stays as it is

    def __isub__(self, other: Any) -> Tensor:  # type: ignore[override,misc]
        return made(self - other)

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[misc]
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
    """Into an array in global memory."""

    def __init__(self, array: Numbers, offset: Any = 0) -> None:
        self.array, self.offset = array, offset
        self.dtype = SimpleNamespace(element_ty=next(x for x in TYPES if STORAGE[str(x)] == array.dtype))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + offset)


def load(p: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    at = np.asarray(p.offset)
    if mask is None:
        return made(p.array[at])
    return made(np.where(mask, p.array[np.where(mask, at, 0)], np.asarray(other, p.array.dtype)))


def store(p: Pointer, value: Any, mask: Any = None) -> None:
    at = np.asarray(p.offset)
    value = to_e4m3(value) if p.array.dtype == np.uint8 else value
    if mask is None:
        p.array[at] = value
    else:
        shape = np.broadcast_shapes(at.shape, np.shape(mask))
        mask = np.broadcast_to(mask, shape)
        p.array[np.broadcast_to(at, shape)[mask]] = np.broadcast_to(value, shape)[mask]


def spoil(p: Pointer, mask: Any) -> None:
    """In place of dropping lines: who reads them later finds NaN."""
    at = np.broadcast_to(np.asarray(p.offset), np.shape(mask))[np.asarray(mask)]
    assert (at * p.array.itemsize % 128 == 0).all(), "a line begins there"
    p.array[at[:, None] + np.arange(128 // p.array.itemsize)] = np.nan
