"""What kernels ask a device before they are chosen and launched. Needs no Triton, so that asking is always possible."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

SMEM = 232_448  # bytes of shared memory that a program on a Hopper GPU can have


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Triton runs kernels in Python, on the CPU, when this is set before it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, the current one if it has no index."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def device_reasons(device: torch.device) -> list[str]:
    """Why no kernel of Triton can run there; empty when one can."""
    if not _triton_installed():
        return ["triton is not installed (pip install triton)"]
    if interpreted():
        return []
    if device.type != "cuda":
        return [f"inputs are on {device}, the kernel needs a CUDA device (or TRITON_INTERPRET=1)"]
    if not torch.cuda.is_available():
        return ["no CUDA device is available"]
    major, minor = capability_of(device)
    return [] if major >= 8 else [f"compute capability {major}.{minor}, the kernel needs 8.0 or newer"]


@cache
def _gluon_installed() -> bool:
    return _triton_installed() and importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper") is not None


def hopper_device_reasons(device: torch.device) -> list[str]:
    """Why no kernel in Gluon for Hopper GPUs can."""
    if interpreted():
        return ["TRITON_INTERPRET=1: Gluon cannot be interpreted"]
    if reasons := device_reasons(device):
        return reasons
    if not _gluon_installed():
        return ["this triton has no Gluon for Hopper (pip install 'triton>=3.6')"]
    major, minor = capability_of(device)
    return [] if major == 9 else [f"compute capability {major}.{minor}, the kernel needs 9.0"]


def chains(device: torch.device) -> bool:
    """Whether kernels can be launched while the one before still runs: programmatic dependent launch, Hopper and on.
    Meta tensors stand for such a device: kernels are compiled for it without a GPU."""
    if interpreted() or device.type not in ("cuda", "meta"):
        return False
    return device.type == "meta" or capability_of(device) >= (9, 0)


@cache
def _device_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sms_of(device: torch.device) -> int:
    """Streaming multiprocessors; those of a Hopper GPU where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return _device_sms(torch.cuda.current_device() if device.index is None else device.index)
