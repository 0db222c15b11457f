"""Write a checkpoint as a stream: a folder appears only when it is whole, and a run that was killed goes on.

Everything is written into ``OUT.partial/files``, which becomes ``OUT`` in one rename at the end. A shard gets its name
when it is complete and on disk; then its hash is recorded, and a later run that finds the same hash skips the shard.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from mlacompile.checkpoint.reader import INDEX
from mlacompile.checkpoint.tensors import TensorSpec, encode_header
from mlacompile.errors import CheckpointError

#: Shards as large as those that save_pretrained writes.
MAX_SHARD_BYTES = 5 * 10**9
_PROGRESS = "progress.json"


def plan_shards(specs: Sequence[TensorSpec], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[TensorSpec]]:
    """File name to tensors, filled in the order of ``specs``; a tensor larger than ``max_bytes`` gets its own file."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


class CheckpointWriter:
    """A folder in the making; a context manager, so that only one process at a time writes to it.

    What is finished can be read in ``files`` before ``commit``.

    Args:
        out: the folder that ``commit`` makes. It must not exist.
        fingerprint: stands for everything that decides the bytes (source, options, version). What an earlier run
            left is taken up if it had the same fingerprint, and thrown away otherwise.

    Raises:
        CheckpointError: ``out`` exists, its parent does not, another process writes to it, or the disk is full.
    """

    def __init__(self, out: str | Path, *, fingerprint: str) -> None:
        self.out = Path(out)
        self.work = self.out.with_name(self.out.name + ".partial")
        self._fingerprint = fingerprint
        self.files = self.work / "files"
        self._done: dict[str, str] = {}
        self._lock: IO[bytes] | None = None

    @property
    def finished(self) -> list[str]:
        """Names of the shards that are on disk already."""
        return sorted(self._done)

    @property
    def scratch(self) -> Path:
        """A folder for what is worth keeping over a crash and is no part of the result: the state of a long work."""
        path = self.work / "scratch"
        path.mkdir(exist_ok=True)
        return path

    def __enter__(self) -> CheckpointWriter:
        self._tidy()
        self._refuse_existing()
        if not self.out.absolute().parent.is_dir():
            raise CheckpointError(f"{self.out}: there is no folder {self.out.absolute().parent}; create it first")
        with _says(self.work):
            self.work.mkdir(exist_ok=True)
            self._lock = self._take_lock()
            self._done = self._recover()
            self._record()  # before any work, so that what is put into scratch is known to belong to this fingerprint
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def write_tensors(
        self,
        shards: dict[str, list[TensorSpec]],
        produce: Callable[[TensorSpec], Tensor],
        advance: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        """Write all shards, and an index if there are several. ``produce`` makes each tensor when its turn comes.

        Tensors of a shard are asked for in order; ``advance`` is told the bytes of each (of a whole shard at once, when
        an earlier run has finished it).

        Raises:
            CheckpointError: not enough room on the disk, or a tensor other than its spec.
        """
        todo = {file: specs for file, specs in shards.items() if file not in self._done}
        needed = sum(spec.nbytes for specs in todo.values() for spec in specs)
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise CheckpointError(
                f"{self.out}: {_size(needed)} to write, but the disk has {_size(free)} left; free some, or choose "
                "another disk"
            )
        for file, specs in shards.items():
            if file in todo:
                self._write_shard(file, specs, produce, advance)
            else:
                advance(sum(spec.nbytes for spec in specs))
        if len(shards) > 1:
            total = sum(spec.nbytes for specs in shards.values() for spec in specs)
            homes = {spec.name: file for file, specs in shards.items() for spec in specs}
            self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))})

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as JSON, to be read by people too."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file other than a shard. These are small, and written anew by every run."""
        _write_whole(self.files / name, data)

    def copy(self, file: Path) -> None:
        """Take a file over as it is."""
        self.write_bytes(file.name, file.read_bytes())

    def commit(self) -> None:
        """Give the folder its name. Before this, nothing is there; after this, everything is."""
        self._refuse_existing()
        with _says(self.out):
            _sync(self.files)
            self.files.rename(self.out)
            _sync(self.out.absolute().parent)
            shutil.rmtree(self.work, ignore_errors=True)

    def _write_shard(
        self,
        file: str,
        specs: list[TensorSpec],
        produce: Callable[[TensorSpec], Tensor],
        advance: Callable[[int], None],
    ) -> None:
        path = self.files / file
        unnamed = path.with_name(file + ".tmp")
        header, offsets = encode_header(specs, {"format": "pt"})
        with _says(unnamed):
            stream = unnamed.open("wb", buffering=0)
        with stream:
            with _says(unnamed):
                _write(stream, memoryview(header))
            for spec in specs:
                tensor = produce(spec)
                if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                    raise CheckpointError(
                        f"tensor {spec.name!r}: got {tensor.dtype} {list(tensor.shape)}, expected {spec.dtype} "
                        f"{list(spec.shape)}"
                    )
                with _says(unnamed, spec.name):
                    stream.seek(offsets[spec.name])
                    _write(stream, _bytes(tensor))
                advance(spec.nbytes)
            with _says(unnamed):
                os.fsync(stream.fileno())
        with _says(path):
            unnamed.rename(path)
            _sync(self.files)
            self._done[file] = _hash(path)
            self._record()

    def _record(self) -> None:
        record = {"fingerprint": self._fingerprint, "shards": self._done}
        _write_whole(self.work / _PROGRESS, json.dumps(record, indent=2).encode())

    def _tidy(self) -> None:
        """Remove what a run left that was killed between the name of its folder and the end of ``commit``."""
        if self.out.exists() and self.work.is_dir() and not self.files.exists():
            shutil.rmtree(self.work, ignore_errors=True)

    def _refuse_existing(self) -> None:
        if self.out.exists() or self.out.is_symlink():
            raise CheckpointError(f"{self.out}: exists already; choose another folder, or remove this one")

    def _take_lock(self) -> IO[bytes]:
        lock = (self.work / "lock").open("wb")
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise CheckpointError(f"{self.out}: another process is writing it; wait for it, or stop it") from None
        return lock

    def _recover(self) -> dict[str, str]:
        """The shards that an earlier run finished, and that are still what it wrote. All else is removed."""
        done: dict[str, str] = {}
        known = False
        # Without a record, or a whole one, nothing is known to be finished.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            record = json.loads((self.work / _PROGRESS).read_bytes())
            known = record["fingerprint"] == self._fingerprint
            if known:
                done = {
                    file: digest
                    for file, digest in record["shards"].items()
                    if (self.files / file).is_file() and _hash(self.files / file) == digest
                }
        if not known:
            shutil.rmtree(self.work / "scratch", ignore_errors=True)
        self.files.mkdir(exist_ok=True)
        for path in self.files.iterdir():
            if path.name not in done:
                path.unlink()
        return done


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(stream: io.FileIO, data: memoryview) -> None:
    """Unbuffered, so that an error belongs to the tensor that is being written. A short write is gone on with."""
    while data:
        data = data[stream.write(data) :]


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    """Replace a file so that it has either its old or its new content, whatever happens."""
    unnamed = path.with_name(path.name + ".tmp")
    with _says(path):
        with unnamed.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        unnamed.rename(path)


def _sync(folder: Path) -> None:
    """A rename is on disk when its folder is."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _says(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Turn what the operating system refuses into an error that says what was being written."""
    try:
        yield
    except OSError as error:
        what = f"{path}: tensor {tensor!r}" if tensor else f"{path}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{what}: the disk is full; free some space and run the same again: it goes on where it stopped"
            ) from error
        raise CheckpointError(f"{what}: cannot be written: {error.strerror or error}") from error


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
