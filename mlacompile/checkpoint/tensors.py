"""What a safetensors header says: name, dtype and shape of every tensor, and where in the file its bytes are.

Format: eight bytes of length, a JSON header of that length, then the bytes of all tensors without a gap
(https://huggingface.co/docs/safetensors). The header is read here rather than by the library, because an error has to
say which tensor of a damaged file is damaged, and a shard is written while most of its tensors do not exist yet.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlacompile.errors import CheckpointError

#: Names of dtypes in safetensors headers.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it exists: its name in the checkpoint, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``spec``, and the offset of its first byte from the beginning of the file."""

    spec: TensorSpec
    file: Path
    offset: int


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as people write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def encode_header(specs: list[TensorSpec], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a file that holds ``specs``, and the offset of each tensor from the beginning of the file.

    Wider elements come first, as the library writes them, so that every tensor is aligned to its element size.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin, relative = 0, {}
    for spec in ordered:
        end = begin + spec.nbytes
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        relative[spec.name], begin = begin, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in relative.items()}


def decode_header(file: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """Every tensor of ``file``, in the order of its bytes, and the file's metadata.

    Raises:
        CheckpointError: the file is not safetensors, is damaged, or ends too early; names the first tensor concerned.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file}: not a whole safetensors file: {size} bytes, and the header alone should take {8 + length}; "
                "fetch the file again"
            )
        text = stream.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        metadata = dict(entries.pop("__metadata__", None) or {})
        found = [_entry(file, 8 + length, name, entry) for name, entry in entries.items()]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged safetensors header ({error}); fetch the file again") from error
    found.sort(key=lambda stored: (stored.offset, stored.spec.nbytes))
    end = 8 + length
    for stored in found:
        if stored.offset != end:
            raise CheckpointError(
                f"{file}: tensor {stored.spec.name!r} begins at byte {stored.offset}, expected {end}: damaged header"
            )
        end += stored.spec.nbytes
        if end > size:
            raise CheckpointError(
                f"{file}: truncated: tensor {stored.spec.name!r} needs bytes up to {end}, the file has {size}; "
                "fetch the file again"
            )
    if end != size:
        raise CheckpointError(f"{file}: {size - end} bytes follow the last tensor; fetch the file again")
    return found, metadata


def _entry(file: Path, start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {entry['dtype']!r}; expected one of {', '.join(DTYPES)}"
        )
    spec = TensorSpec(name, DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
    begin, end = entry["data_offsets"]
    if end - begin != spec.nbytes or min(spec.shape, default=1) < 0:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {list(spec.shape)} and dtype {entry['dtype']} takes {spec.nbytes} "
            f"bytes, the header says {end - begin}: damaged header"
        )
    return StoredTensor(spec, file, start + begin)
