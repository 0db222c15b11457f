"""``mlacompile::fp8_linear`` and what makes its weights: products of FP8 activations and FP8 weights, both scaled.

The DeepSeek-V3 recipe (arXiv 2412.19437, section 3.3): activations have a float32 scale for every 128 values of a row,
weights one for every block of 128 × 128, and products are summed in float32:

    y[m, n] = Σ_g  x_descale[m, g] · weight_descale[n / 128, g] · Σ_{k in g} x[m, k] · weight[n, k]

Blocks at the lower and right edge of a weight may be smaller. What happens to zeros, denormals and values that are not
finite is said in ``fp8_quantize.py`` and is the same here, block for block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.ops.fp8_quantize import descale_of, fp8_dequantize_reference, in_groups, rounded

E4M3 = torch.float8_e4m3fn


def block_grid(rows: int, columns: int) -> tuple[int, int]:
    """How many scales the weight ``[rows, columns]`` has."""
    return scale_groups(rows), scale_groups(columns)


def fp8_quantize_weight_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, one row of blocks at a time: a weight in float32 is never whole in memory."""
    quantized = [_quantize_row_of_blocks(rows) for rows in weight.split(SCALE_GROUP)]
    return torch.cat([q for q, _ in quantized]), torch.stack([d for _, d in quantized])


def _quantize_row_of_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x ``[up to 128, K]`` → q of that shape and descale ``[⌈K / 128⌉]``."""
    qs, descales = [], []
    for part in in_groups(x.to(torch.float32), SCALE_GROUP):
        descale = descale_of(part.abs().amax(dim=(0, 2)), E4M3)
        qs.append(rounded(part, descale.unsqueeze(-1), E4M3).flatten(-2))
        descales.append(descale)
    return torch.cat(qs, dim=1), torch.cat(descales)


def fp8_dequantize_weight_reference(q: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch: every row has the scales of its row of blocks."""
    rows = descale.repeat_interleave(SCALE_GROUP, dim=0)[: q.shape[0]]
    return fp8_dequantize_reference(q, rows, SCALE_GROUP, dtype)


def fp8_linear_reference(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The op in plain PyTorch: both factors dequantized, which is exact up to one rounding in float32 each, and
    multiplied in float32."""
    left = fp8_dequantize_reference(x, x_descale, SCALE_GROUP, torch.float32)
    right = fp8_dequantize_weight_reference(weight, weight_descale, torch.float32)
    return (left @ right.t()).to(dtype)


@torch.library.custom_op("mlacompile::fp8_quantize_weight", mutates_args=())
def fp8_quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight to e4m3 with one scale a block of 128 × 128.

    Args:
        weight: ``[N, K]``, floating point.
    Returns:
        q e4m3 ``[N, K]`` and descale float32 ``[⌈N / 128⌉, ⌈K / 128⌉]``, which multiplies on read (``weight_scale_inv``
        in checkpoints).
    Raises:
        UnsupportedInputError: not a matrix of floating point values.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UnsupportedInputError(
            f"fp8_quantize_weight: got a weight of {weight.dtype} {list(weight.shape)}; expected a floating point "
            "matrix [N, K]"
        )
    return fp8_quantize_weight_reference(weight)


@fp8_quantize_weight.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    return (
        weight.new_empty(weight.shape, dtype=E4M3),
        weight.new_empty(block_grid(*weight.shape), dtype=torch.float32),
    )


@torch.library.custom_op("mlacompile::fp8_dequantize_weight", mutates_args=())
def fp8_dequantize_weight(q: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]`` in ``dtype`` again, from e4m3 ``[N, K]`` and descale ``[⌈N / 128⌉, ⌈K / 128⌉]``.

    Raises:
        UnsupportedInputError: scales of another shape or dtype.
    """
    check_weight("fp8_dequantize_weight", q, descale)
    return fp8_dequantize_weight_reference(q, descale, dtype)


@fp8_dequantize_weight.register_fake
def _(q: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.custom_op("mlacompile::fp8_linear", mutates_args=())
def fp8_linear(x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T`` of scaled FP8 factors.

    Args:
        x: e4m3 ``[M, K]``. x_descale: float32 ``[M, ⌈K / 128⌉]``: both from ``fp8_quantize(x, 128, …)``.
        weight: e4m3 ``[N, K]``. weight_descale: float32 ``[⌈N / 128⌉, ⌈K / 128⌉]``.
        dtype: of the result.
    Returns:
        ``[M, N]`` in ``dtype``, summed in float32.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together.
    """
    check_weight("fp8_linear", weight, weight_descale)
    want = (x.shape[0], scale_groups(weight.shape[1]))
    if x.dim() != 2 or x.dtype != E4M3 or x.shape[1] != weight.shape[1] or tuple(x_descale.shape) != want:
        raise UnsupportedInputError(
            f"fp8_linear: got x of {x.dtype} {list(x.shape)} with scales {list(x_descale.shape)} for a weight "
            f"{list(weight.shape)}; expected {E4M3} [M, {weight.shape[1]}] with [M, {want[1]}]: fp8_quantize(x, 128, …)"
        )
    return fp8_linear_reference(x, x_descale, weight, weight_descale, dtype)


@fp8_linear.register_fake
def _(x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


def check_weight(op: str, weight: Tensor, descale: Tensor) -> None:
    """Raise UnsupportedInputError unless these are an e4m3 matrix and its scales."""
    want = block_grid(*weight.shape) if weight.dim() == 2 else ()
    if weight.dim() != 2 or weight.dtype != E4M3 or tuple(descale.shape) != want or descale.dtype != torch.float32:
        raise UnsupportedInputError(
            f"{op}: got a weight of {weight.dtype} {list(weight.shape)} with scales of {descale.dtype} "
            f"{list(descale.shape)}; expected {E4M3} [N, K] and torch.float32 {list(want)}, one for a block of "
            f"{SCALE_GROUP} × {SCALE_GROUP}. Scales in e8m0 become float32 by .to(torch.float32)."
        )
