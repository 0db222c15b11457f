"""Launches the Triton kernel of ``absorb_and_write``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mlacompile.kernels.absorb_and_write.portable import _absorb_and_write_kernel
from mlacompile.kernels.device import sms_of
from mlacompile.kernels.fp8_linear.launch import Tiles, choose_tiles, descriptor
from mlacompile.kernels.launch import Launch
from mlacompile.kernels.write_latents.launch import launch as write_launch
from mlacompile.ops.absorb_and_write import empty_results


def absorb_and_write_triton(
    x: Tensor, weight: Tensor, weight_descale: Tensor, *written: Any, **settings: Any
) -> tuple[Tensor, Tensor]:
    """The op by the Triton kernel, for inputs that ``triton_reasons`` has nothing against."""
    absorbed, turned = empty_results(x, weight, written[0], written[2])
    launch(x, weight, weight_descale, written, absorbed, turned, **settings)()
    return absorbed, turned


def launch(
    x: Tensor, weight: Tensor, weight_descale: Tensor, written: Sequence[Any], absorbed: Tensor, turned: Tensor,
    tiles: Tiles | None = None, **settings: Any,
) -> Launch:  # fmt: skip
    """The launch: programs that write and rotate, which take longest to begin, and then those of the product. Meta
    tensors do, to compile without a GPU."""
    (heads, m, k), n = x.shape, weight.shape[1]
    tiles = tiles or choose_tiles(m, n, k, heads, sms_of(x.device))
    of_write: Any = (*written, turned)
    (writes,), arguments, options = write_launch(*of_write, **settings)
    blocks_n, blocks_m = -(-n // tiles.block_n), -(-m // tiles.block_m)
    arguments |= {
        "writes": writes, "d_x": descriptor(x, tiles.block_m), "d_w": descriptor(weight, tiles.block_n),
        "p_descale": weight_descale, "p_absorbed": absorbed, "M": m, "N": n, "K": k,
        "stride_dh": weight_descale.stride(0), "stride_dn": weight_descale.stride(1), "blocks_n": blocks_n,
        "blocks_m": blocks_m, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "STAGES": tiles.stages,
    }  # fmt: skip
    programs = writes + blocks_n * blocks_m * heads
    return Launch(_absorb_and_write_kernel, (programs,), arguments, {**options, "num_warps": tiles.warps})
