"""Chooses tiles for ``head_product`` and launches it."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from mlacompile.kernels.device import chains
from mlacompile.kernels.head_product.portable import _head_product_kernel

#: Elements of a tile, by measurement on an H100 (docs/kernels.md): 8 KB of 16-bit weights in flight a program of two
#: warps, so that nearly all programs of 128 heads fit on the device at once.
_TILE = 4096
_LONGEST = 512  # elements of a tile's row along K
_ACROSS = 128  # and of its column, where N is contiguous


def head_product_triton(x: Tensor, weight: Tensor, *, early: bool = False) -> Tensor:
    """``head_product`` by the Triton kernel, for inputs that ``triton_reasons`` has nothing against."""
    out = x.new_empty(x.shape[0], 1, weight.shape[2])
    grid, arguments, options = launch(x, weight, out, early=early and chains(x.device))
    _head_product_kernel[grid](**arguments, **options)
    return out


def launch(
    x: Tensor, weight: Tensor, out: Tensor, *, early: bool = False
) -> tuple[tuple[int, int], dict[str, Any], dict[str, Any]]:
    """Grid, arguments and options of one launch. Meta tensors do, to compile without a GPU."""
    heads, k, n = weight.shape
    along_k = weight.stride(1) == 1
    block_k = min(triton.next_power_of_2(k), _LONGEST if along_k else _ACROSS)
    block_n = min(triton.next_power_of_2(n), _TILE // block_k)
    arguments = {
        "p_x": x, "p_w": weight, "p_out": out, "K": k, "N": n,
        "stride_xh": x.stride(0), "stride_wh": weight.stride(0), "stride_w": weight.stride(2 if along_k else 1),
        "BLOCK_N": block_n, "BLOCK_K": block_k, "ALONG_K": along_k,
        "WHOLE": k <= block_k, "EARLY": early,
    }  # fmt: skip
    options = {"num_warps": 2, **({"launch_pdl": True} if early else {})}
    return (triton.cdiv(n, block_n), heads), arguments, options
