"""Which kernels serve an op: a lookup by name, best first, that imports nothing heavy until it is asked.

A family of kernels is a package under ``mlacompile.kernels`` with a tuple ``KERNELS``. The first kernel whose
``supports`` returns no reason against the inputs is the best one for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from mlacompile.errors import UnsupportedInputError

#: op -> the package that holds its kernels
_FAMILIES = {
    "head_product": "mlacompile.kernels.head_product",
    "heads_quantized": "mlacompile.kernels.heads_quantized",
    "mla_decode": "mlacompile.kernels.mla_decode",
    "mla_prefill": "mlacompile.kernels.mla_prefill",
    "row_product": "mlacompile.kernels.row_product",
    "absorb_and_write": "mlacompile.kernels.absorb_and_write",
    "write_latents": "mlacompile.kernels.write_latents",
    "fp8_linear": "mlacompile.kernels.fp8_linear",
    "fp8_linear_parts": "mlacompile.kernels.fp8_linear_parts",
    "fp8_normed": "mlacompile.kernels.fp8_normed",
    "fp8_stacked": "mlacompile.kernels.fp8_stacked",
    "fp8_experts": "mlacompile.kernels.fp8_experts",
    "quantize_rows": "mlacompile.kernels.quantize_rows",
}


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    supports: called like the op; the human reasons why this kernel cannot take these inputs, empty when it can.
    run: called like the op, only after ``supports`` found no reason; same results as the op's reference.
    slower: called like the op; why, by measurements, a later kernel is faster here. Such a kernel serves where no
        other can, and when it is asked for by name.
    """

    name: str
    op: str
    supports: Callable[..., list[str]]
    run: Callable[..., Any]
    slower: Callable[..., list[str]] = lambda *args, **kwargs: []


@cache
def kernels(op: str) -> tuple[Kernel, ...]:
    """The kernels of an op, best first; empty for an op that has none."""
    family = _FAMILIES.get(op)
    return () if family is None else tuple(importlib.import_module(family).KERNELS)


@cache
def names(op: str) -> tuple[str, ...]:
    return tuple(kernel.name for kernel in kernels(op))


def find(op: str, name: str) -> Kernel:
    """The kernel of that name. KeyError when there is none: ``names`` lists what there is."""
    for kernel in kernels(op):
        if kernel.name == name:
            return kernel
    raise KeyError(f"op {op!r} has no kernel {name!r}; it has {', '.join(names(op)) or 'none'}")


def best(op: str, *args: Any, **kwargs: Any) -> tuple[Kernel | None, dict[str, list[str]]]:
    """The kernel that should serve these inputs, None when none can, and for each that stands before it the reasons."""
    passed: dict[str, list[str]] = {}
    able: list[Kernel] = []
    for kernel in kernels(op):
        reasons = kernel.supports(*args, **kwargs)
        if not reasons:
            able.append(kernel)
            reasons = kernel.slower(*args, **kwargs)
            if not reasons:
                return kernel, passed
        passed[kernel.name] = reasons
    if not able:
        return None, passed
    passed.pop(able[0].name)
    return able[0], passed


def chosen(op: str, impl: str, *args: Any, **kwargs: Any) -> Kernel | None:
    """The kernel that computes a call of an op with ``impl``: "auto", "reference" or a name. None for the reference.

    Raises:
        UnsupportedInputError: there is no kernel of that name, or it cannot take these inputs.
    """
    if impl == "reference":
        return None
    if impl == "auto":
        return best(op, *args, **kwargs)[0]
    try:
        kernel = find(op, impl)
    except KeyError as error:
        raise UnsupportedInputError(str(error.args[0])) from None
    if reasons := kernel.supports(*args, **kwargs):
        raise UnsupportedInputError(
            f"{op}: impl={impl!r} cannot take these inputs: {'; '.join(reasons)}. "
            "Use impl='auto' to fall back to one that can."
        )
    return kernel
