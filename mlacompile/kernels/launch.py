"""One launch of a kernel, to run or to compile, and how launches follow one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mlacompile.kernels.device import chains


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](**arguments, **options)``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def chained(device: torch.device) -> dict[str, bool]:
    """The options of a launch that may begin while the one before it ends; its kernel then waits for that before it
    reads or writes anything that others write or read."""
    return {"launch_pdl": True} if chains(device) else {}
