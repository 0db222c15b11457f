"""Kernels of ``mlacompile::mla_decode``, best first."""

from __future__ import annotations

from mlacompile.kernels.mla_decode.cpu import cpu_reasons, mla_decode_cpu
from mlacompile.kernels.mla_decode.supports import hopper_reasons, hopper_slower, portable_reasons
from mlacompile.kernels.registry import Kernel


def _run_portable(*args: object, **kwargs: object) -> object:
    from mlacompile.kernels.mla_decode.launch import mla_decode_portable  # imports triton

    return mla_decode_portable(*args, **kwargs)  # type: ignore[arg-type]


def _run_hopper(*args: object, **kwargs: object) -> object:
    from mlacompile.kernels.mla_decode.hopper_launch import mla_decode_hopper  # imports triton

    return mla_decode_hopper(*args, **kwargs)  # type: ignore[arg-type]


KERNELS = (
    Kernel("gluon", "mla_decode", hopper_reasons, _run_hopper, hopper_slower),
    Kernel("triton", "mla_decode", portable_reasons, _run_portable),
    Kernel("cpu", "mla_decode", cpu_reasons, mla_decode_cpu),
)
