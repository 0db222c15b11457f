"""``mlacompile::heads_quantized``: products of heads, side by side and in FP8, as the product behind them takes rows.

    heads      = x @ weightᵀ                            of each head, ``fp8_linear``
    q, descale = fp8_quantize(heads side by side)       a group of 128 values, one scale, is a head

So latents that attention has made become rows of the output projection in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import E4M3, check_weight, fp8_linear_reference
from mlacompile.ops.fp8_quantize import fp8_quantize_reference


def heads_quantized_reference(
    x: Tensor, weight: Tensor, weight_descale: Tensor, *, spent: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition: heads are rounded to the dtype of x before they are quantized. Nothing is dropped."""
    heads = fp8_linear_reference(x, None, weight, weight_descale, x.dtype)
    return fp8_quantize_reference(heads.transpose(0, 1).flatten(1), SCALE_GROUP, E4M3)


@torch.library.custom_op("mlacompile::heads_quantized", mutates_args=())
def heads_quantized(
    x: Tensor, weight: Tensor, weight_descale: Tensor, *, spent: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rows of heads in e4m3, as ``fp8_linear`` takes them.

    Args:
        x: ``[H, M, K]`` in 16 or 32 bits. weight, weight_descale: ``[H, 128, K]`` in e4m3 and its scales.
        spent: nobody reads x again: what it holds afterwards is not defined. Only the lowering can know that, and no
            schema says it.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        q e4m3 ``[M, H · 128]``, descale float32 ``[M, H]``, both contiguous.
    Raises:
        UnsupportedInputError: inputs that do not fit together, or a named kernel that cannot take them.
    """
    check_weight("heads_quantized", weight, weight_descale)
    fits = x.dim() == weight.dim() == 3 and x.shape[::2] == weight.shape[::2] and weight.shape[1] == SCALE_GROUP
    if not fits or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedInputError(
            f"heads_quantized: got x of {x.dtype} {list(x.shape)} and a weight {list(weight.shape)}; expected "
            f"[H, M, K] of 16 or 32 bits and [H, {SCALE_GROUP}, K]"
        )
    kernel = registry.chosen("heads_quantized", impl, x, weight, weight_descale, spent=spent)
    if kernel is None:
        return heads_quantized_reference(x, weight, weight_descale)
    return kernel.run(x, weight, weight_descale, spent=spent)  # type: ignore[no-any-return]


@heads_quantized.register_fake
def _(
    x: Tensor, weight: Tensor, weight_descale: Tensor, *, spent: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    return empty_results(x)


def empty_results(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the results."""
    heads, m, _ = x.shape
    return x.new_empty((m, heads * SCALE_GROUP), dtype=E4M3), x.new_empty((m, heads), dtype=torch.float32)
