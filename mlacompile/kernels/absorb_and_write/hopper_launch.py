"""Launches the Hopper kernel of ``absorb_and_write``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mlacompile.kernels.fp8_linear.heads_launch import product_arguments
from mlacompile.kernels.launch import Launch
from mlacompile.kernels.write_latents.launch import launch as write_launch
from mlacompile.ops.absorb_and_write import empty_results

TOKENS = 16  # whose queries of a head are rotated at once
REGISTERS = 96  # of a thread that writes or rotates


def absorb_and_write_hopper(
    x: Tensor, weight: Tensor, weight_descale: Tensor, *written: Any, **settings: Any
) -> tuple[Tensor, Tensor]:
    """The op by the Hopper kernel, for inputs that ``hopper_reasons`` has nothing against."""
    absorbed, turned = empty_results(x, weight, written[0], written[2])
    hopper_launch(x, weight, weight_descale, written, absorbed, turned, **settings)()
    return absorbed, turned


def hopper_launch(
    x: Tensor, weight: Tensor, weight_descale: Tensor, written: Sequence[Any], absorbed: Tensor, turned: Tensor,
    **settings: Any,
) -> Launch:  # fmt: skip
    """The launch. Meta tensors do, to compile without a GPU."""
    from mlacompile.kernels.absorb_and_write.hopper import _absorb_and_write_hopper_kernel

    of_write: Any = (*written, turned)
    _, arguments, options = write_launch(*of_write, **settings)
    for name in ("BLOCK_H", "PDL"):
        arguments.pop(name)
    arguments["GROUP"] = arguments["GROUP"] or arguments["BLOCK_R"]
    arguments |= {**product_arguments(x, weight, weight_descale, absorbed), "TOKENS": TOKENS, "REGS": REGISTERS}
    return Launch(_absorb_and_write_hopper_kernel, (x.shape[0],), arguments, {**options, "num_warps": 8})
