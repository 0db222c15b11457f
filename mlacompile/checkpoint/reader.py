"""Read a checkpoint tensor by tensor: whatever is missing or damaged is said before any work, with file and tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from mlacompile.checkpoint.tensors import StoredTensor, TensorSpec, decode_header
from mlacompile.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FINITE_CHUNK = 1 << 24


class CheckpointReader:
    """The tensors of a folder (one file or shards with an index), or of one ``.safetensors`` file.

    Opening reads headers only. ``tensors`` maps each name to its ``StoredTensor``; ``read`` loads one.

    Raises:
        CheckpointError: nothing to read, a shard that is missing, truncated or damaged, an index that disagrees with
            its shards, or a tensor stored twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, StoredTensor] = {}
        expected, files = _files(self.path)
        for file in files:
            if not file.is_file():
                name = next(name for name, home in expected.items() if home == file.name)
                raise CheckpointError(f"{file}: missing; {INDEX} says that it holds {name!r}")
            for stored in decode_header(file)[0]:
                name = stored.spec.name
                if name in self.tensors:
                    raise CheckpointError(f"tensor {name!r} is both in {self.tensors[name].file} and in {file}")
                self.tensors[name] = stored
        for name, home in expected.items():
            if name not in self.tensors or self.tensors[name].file.name != home:
                raise CheckpointError(f"{self.path / home}: tensor {name!r} is not in it, but {INDEX} says so")
        if not self.tensors:
            raise CheckpointError(f"{self.path}: no tensors in it")

    @property
    def folder(self) -> Path:
        """Where configuration and tokenizer would be."""
        return self.path if self.path.is_dir() else self.path.parent

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor. Raises ``CheckpointError`` if there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self.tensors[name].spec

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in. Its memory is its own.

        Raises:
            CheckpointError: no such tensor; or a value of it is NaN or infinite.
        """
        spec = self.spec(name)
        stored = self.tensors[name]
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        data = bytearray(spec.nbytes)
        try:
            with stored.file.open("rb") as stream:
                stream.seek(stored.offset)
                got = stream.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{stored.file}: tensor {name!r} cannot be read: {error.strerror}") from error
        if got != spec.nbytes:
            raise CheckpointError(f"{stored.file}: truncated inside tensor {name!r}: got {got} of {spec.nbytes} bytes")
        tensor = torch.frombuffer(data, dtype=spec.dtype).reshape(spec.shape)
        self._refuse_nonfinite(stored, tensor)
        return tensor

    def fingerprint(self) -> str:
        """Changes whenever a file of this checkpoint was replaced: hashes headers, sizes and times, not the weights."""
        digest = hashlib.sha256()
        for file in sorted({stored.file for stored in self.tensors.values()}):
            stat = file.stat()
            digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        for name, stored in sorted(self.tensors.items()):
            digest.update(f"{name}\0{stored.spec}\0{stored.offset}\0".encode())
        return digest.hexdigest()

    def _refuse_nonfinite(self, stored: StoredTensor, tensor: Tensor) -> None:
        if not tensor.is_floating_point():
            return
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), _FINITE_CHUNK):
            chunk = flat[start : start + _FINITE_CHUNK]
            finite = torch.isfinite(chunk if chunk.dtype.itemsize > 1 else chunk.float())
            if not finite.all():
                first = start + int((~finite).nonzero()[0])
                index = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.spec.name!r} is {flat[first].item()} at {index}; expected finite "
                    "weights: the file is damaged, or the model diverged in training"
                )


def _files(path: Path) -> tuple[dict[str, str], list[Path]]:
    """What the index promises (tensor name to file name; empty without one), and the files to read."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: expected a .safetensors file or a folder of them{_hint([path])}")
        return {}, [path]
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder")
    index = path / INDEX
    if index.is_file():
        try:
            expected = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: cannot be read: {error!r}; expected a weight_map in JSON") from error
        outside = next((file for file in expected.values() if Path(file).name != file), None)
        if outside is not None:
            raise CheckpointError(f"{index}: names the file {outside!r}; expected names without a folder")
        return expected, [path / file for file in sorted(set(expected.values()))]
    if (path / _SINGLE).is_file():
        return {}, [path / _SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(file for pattern in (*_PICKLED, "*.gguf") for file in path.glob(pattern))
        raise CheckpointError(f"{path}: no .safetensors file in it{_hint(others)}")
    return {}, files


def _hint(files: list[Path]) -> str:
    if any(file.suffix == ".gguf" for file in files):
        return (
            "; a GGUF file is read by transformers: AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME), then "
            "save_pretrained"
        )
    if any(file.match(pattern) for file in files for pattern in _PICKLED):
        return (
            f" ({files[0].name} is a pickle, which can run any code, and is never read; save_pretrained() of "
            "transformers writes safetensors)"
        )
    return ""
