"""``mlacompile::fp8_linear`` and what makes its weights: products of FP8 activations and FP8 weights, both scaled.

The DeepSeek-V3 recipe (arXiv 2412.19437, section 3.3): activations have a float32 scale for every 128 values of a row,
weights one for every block of 128 × 128, and products are summed in float32:

    y[m, n] = Σ_g  x_descale[m, g] · weight_descale[n / 128, g] · Σ_{k in g} x[m, k] · weight[n, k]

Blocks at the lower and right edge of a weight may be smaller. What happens to zeros, denormals and values that are not
finite is said in ``fp8_quantize.py`` and is the same here, block for block.

Two things are more general than the recipe. Activations may stay as they are (no ``x_descale``): with few rows the time
is that of reading weights, and quantizing activations would cost precision for nothing. And everything may have a first
dimension of heads, each with a weight of its own, as absorbed products have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels import registry
from mlacompile.ops.fp8_quantize import descale_of, fp8_dequantize_reference, in_groups, rounded

E4M3 = torch.float8_e4m3fn
#: Up to so many rows of x the time is that of reading the weight, whether x is quantized or not (docs/kernels.md).
WEIGHT_ONLY_ROWS = 16


def block_grid(rows: int, columns: int) -> tuple[int, int]:
    """How many scales the weight ``[rows, columns]`` has."""
    return scale_groups(rows), scale_groups(columns)


def fp8_quantize_weight_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, one row of blocks at a time: a weight in float32 is never whole in memory."""
    quantized = [_quantize_row_of_blocks(rows) for rows in weight.split(SCALE_GROUP, dim=-2)]
    return torch.cat([q for q, _ in quantized], dim=-2), torch.stack([d for _, d in quantized], dim=-2)


def _quantize_row_of_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x ``[…, up to 128, K]`` → q of that shape and descale ``[…, ⌈K / 128⌉]``."""
    qs, descales = [], []
    for part in in_groups(x.to(torch.float32), SCALE_GROUP):
        descale = descale_of(part.abs().amax(dim=(-3, -1)), E4M3)
        qs.append(rounded(part, descale[..., None, :, None], E4M3).flatten(-2))
        descales.append(descale)
    return torch.cat(qs, dim=-1), torch.cat(descales, dim=-1)


def fp8_dequantize_weight_reference(q: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch: every row has the scales of its row of blocks."""
    rows = descale.repeat_interleave(SCALE_GROUP, dim=-2)[..., : q.shape[-2], :]
    return fp8_dequantize_reference(q, rows, SCALE_GROUP, dtype)


def fp8_linear_reference(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The op in plain PyTorch: what is quantized is dequantized, exact up to one rounding in float32, and multiplied in
    float32."""
    left = x.float() if x_descale is None else fp8_dequantize_reference(x, x_descale, SCALE_GROUP, torch.float32)
    right = fp8_dequantize_weight_reference(weight, weight_descale, torch.float32)
    return (left @ right.transpose(-1, -2)).to(dtype)


def lost_rows(weight: Tensor, q: Tensor) -> Tensor:
    """Which rows ``[n]`` of a weight became zero: a scale serves 128 of them, and one that is half a million times
    smaller than the largest of its blocks is gone."""
    return ((weight != 0).any(-1) & (q.view(torch.uint8) & 0x7F == 0).all(-1)).nonzero()[:, -1]


@torch.library.custom_op("mlacompile::fp8_quantize_weight", mutates_args=())
def fp8_quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight to e4m3 with one scale a block of 128 × 128.

    Args:
        weight: ``[N, K]``, or ``[H, N, K]`` with blocks of their own for every head; floating point.
    Returns:
        q e4m3 of the same shape and descale float32 ``[(H,) ⌈N / 128⌉, ⌈K / 128⌉]``, which multiplies on read
        (``weight_scale_inv`` in checkpoints). Both contiguous.
    Raises:
        UnsupportedInputError: not a matrix of floating point values, nor one a head.
    """
    if weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise UnsupportedInputError(
            f"fp8_quantize_weight: got a weight of {weight.dtype} {list(weight.shape)}; expected a floating point "
            "matrix [N, K], or one a head [H, N, K]"
        )
    return fp8_quantize_weight_reference(weight)


@fp8_quantize_weight.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    return (
        weight.new_empty(weight.shape, dtype=E4M3),
        weight.new_empty((*weight.shape[:-2], *block_grid(*weight.shape[-2:])), dtype=torch.float32),
    )


@torch.library.custom_op("mlacompile::fp8_dequantize_weight", mutates_args=())
def fp8_dequantize_weight(q: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[(H,) N, K]`` in ``dtype`` again, from e4m3 and descale ``[(H,) ⌈N / 128⌉, ⌈K / 128⌉]``.

    Raises:
        UnsupportedInputError: scales of another shape or dtype.
    """
    check_weight("fp8_dequantize_weight", q, descale)
    return fp8_dequantize_weight_reference(q, descale, dtype)


@fp8_dequantize_weight.register_fake
def _(q: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.custom_op("mlacompile::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor,
    x_descale: Tensor | None,
    weight: Tensor,
    weight_descale: Tensor,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> Tensor:
    """``x @ weight.T`` with a weight in FP8, and x in FP8 or not.

    Args:
        x: ``[(H,) M, K]``, e4m3 with x_descale float32 ``[(H,) M, ⌈K / 128⌉]``, both from ``fp8_quantize(x, 128, …)``;
            or floating point of 16 or 32 bits, x_descale None. Any strides.
        weight: e4m3 ``[(H,) N, K]``. weight_descale: float32 ``[(H,) ⌈N / 128⌉, ⌈K / 128⌉]``.
        dtype: of the result.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[(H,) M, N]`` in ``dtype``, summed in float32, contiguous.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together, or a named kernel that cannot take them.
    """
    check_weight("fp8_linear", weight, weight_descale)
    check_left("fp8_linear", x, x_descale, weight)
    kernel = registry.chosen("fp8_linear", impl, x, x_descale, weight, weight_descale, dtype)
    if kernel is None:
        return fp8_linear_reference(x, x_descale, weight, weight_descale, dtype)
    return kernel.run(x, x_descale, weight, weight_descale, dtype)  # type: ignore[no-any-return]


@fp8_linear.register_fake
def _(
    x: Tensor,
    x_descale: Tensor | None,
    weight: Tensor,
    weight_descale: Tensor,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[-2]), dtype=dtype)


def check_left(op: str, x: Tensor, x_descale: Tensor | None, weight: Tensor) -> None:
    """Raise UnsupportedInputError unless x, in FP8 with these scales or not, can be multiplied with such a weight."""
    *heads, _, k = weight.shape
    fits = x.dim() == weight.dim() and list(x.shape[:-2]) == heads and x.shape[-1] == k
    want = [*x.shape[:-1], scale_groups(k)]
    if x_descale is None:
        right = fits and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    else:
        right = fits and x.dtype == E4M3 and list(x_descale.shape) == want and x_descale.dtype == torch.float32
    if not right:
        scales = "none" if x_descale is None else f"{x_descale.dtype} {list(x_descale.shape)}"
        rows = ", ".join([*map(str, heads), "M"])
        raise UnsupportedInputError(
            f"{op}: got x of {x.dtype} {list(x.shape)} with scales {scales} for a weight {list(weight.shape)}; "
            f"expected [{rows}, {k}], either {E4M3} with torch.float32 scales [{rows}, {want[-1]}], "
            "fp8_quantize(x, 128, …), or of 16 or 32 bits with no scales"
        )


def check_weight(op: str, weight: Tensor, descale: Tensor) -> None:
    """Raise UnsupportedInputError unless these are e4m3 matrices and their scales."""
    matrix = weight.dim() in (2, 3)
    want = (*weight.shape[:-2], *block_grid(*weight.shape[-2:])) if matrix else ()
    if not matrix or weight.dtype != E4M3 or tuple(descale.shape) != want or descale.dtype != torch.float32:
        raise UnsupportedInputError(
            f"{op}: got a weight of {weight.dtype} {list(weight.shape)} with scales of {descale.dtype} "
            f"{list(descale.shape)}; expected {E4M3} [N, K] or [H, N, K] and torch.float32 {list(want)}, one for a "
            f"block of {SCALE_GROUP} × {SCALE_GROUP}. Scales in e8m0 become float32 by .to(torch.float32)."
        )
