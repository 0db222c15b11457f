"""Layers that take long to make, on disk as soon as they are made: a run that was killed does not make them again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlacompile.checkpoint import CheckpointReader
from mlacompile.convert.form import MLALayer
from mlacompile.errors import CheckpointError


class Shelf:
    """Latent layers by number, in a folder that belongs to one conversion (``CheckpointWriter.scratch``)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __contains__(self, i: int) -> bool:
        """Whether layer ``i`` is there, whole."""
        try:
            CheckpointReader(self._file(i))
        except CheckpointError:
            return False
        return True

    def put(self, i: int, layer: MLALayer, note: dict[str, Any] | None = None) -> None:
        """Keep layer ``i``, in place of an earlier one, and what is known of it, as JSON."""
        values = {name: value.contiguous() for name, value in vars(layer).items() if isinstance(value, Tensor)}
        # float64, because the scale of the scores is part of what a lossless layer is.
        values["scale"] = torch.tensor(layer.scale, dtype=torch.float64)
        unnamed = self._file(i).with_suffix(".tmp")
        save_file(values, unnamed, {"note": json.dumps(note or {})})
        with unnamed.open("rb") as stream:
            os.fsync(stream.fileno())
        unnamed.rename(self._file(i))

    def note(self, i: int) -> dict[str, Any]:
        """What was put beside layer ``i``."""
        with safe_open(self._file(i), framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["note"])
            return found

    def get(self, i: int) -> MLALayer:
        """Layer ``i``. Raises ``CheckpointError`` if it is not there."""
        reader = CheckpointReader(self._file(i))
        # A tensor that torch allocates is aligned as one that was just computed: products add up in the same order.
        values = {name: reader.read(name).clone() for name in reader.tensors if name != "scale"}
        absent: dict[str, Tensor | None] = {"b_q": None, "b_dkv": None, "b_kr": None, "b_o": None}
        return MLALayer(**{**absent, **values}, scale=reader.read("scale").item())  # type: ignore[arg-type]

    def remember(self, name: str, find: Callable[[], Any]) -> Any:
        """A value of JSON's kinds that an earlier run found, or else what ``find`` finds."""
        file = self._folder / f"{name}.json"
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError):
            found = find()
        unnamed = file.with_suffix(".tmp")
        unnamed.write_text(json.dumps(found))
        unnamed.rename(file)
        return found

    def _file(self, i: int) -> Path:
        return self._folder / f"layer-{i:05d}.safetensors"
