"""``mlacompile::fp8_normed``: FP8 products of rows that an RMS norm stands before, and its root behind them.

    out = (x @ weight.T) / √(mean(row²) + eps)

``quantize_rows(..., squares=True)`` leaves the root out: it is one factor of a row, which the product can take as well,
and finding it first would have every row wait for all of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import check_left, check_weight, fp8_linear_reference
from mlacompile.ops.quantize_rows import STRETCH


def fp8_normed_reference(
    x: Tensor, x_descale: Tensor, squares: Tensor, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype,
    *, eps: float,
) -> Tensor:  # fmt: skip
    """The definition: one product after the other, side by side, in float32 up to the root."""
    pairs = zip(weights, descales, strict=True)
    products = torch.cat([fp8_linear_reference(x, x_descale, w, s, torch.float32) for w, s in pairs], -1)
    return (products * torch.rsqrt(squares.sum(-1, keepdim=True) / x.shape[1] + eps)).to(dtype)


@torch.library.custom_op("mlacompile::fp8_normed", mutates_args=())
def fp8_normed(
    x: Tensor,
    x_descale: Tensor,
    squares: Tensor,
    weights: list[Tensor],
    descales: list[Tensor],
    dtype: torch.dtype,
    *,
    eps: float,
    impl: str = "auto",
) -> Tensor:
    """``x @ torch.cat(weights).T``, each row divided by the root of its mean square.

    Args:
        x: e4m3 ``[M, K]``. x_descale: float32 ``[M, ⌈K / 128⌉]``. squares: float32 ``[M, ⌈K / STRETCH⌉]``; all from
            ``quantize_rows(..., squares=True)``.
        weights: one or two, e4m3 ``[Nᵢ, K]``, the first of two with N in multiples of 128. descales: theirs, float32
            ``[⌈Nᵢ / 128⌉, ⌈K / 128⌉]``.
        dtype: of the result. eps: of the norm.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[M, ΣNᵢ]`` in ``dtype``, summed in float32, contiguous.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together, or a named kernel that cannot take them.
    """
    _check(x, x_descale, squares, weights, descales)
    arguments = (x, x_descale, squares, weights, descales, dtype)
    kernel = registry.chosen("fp8_normed", impl, *arguments, eps=eps)
    if kernel is None:
        return fp8_normed_reference(*arguments, eps=eps)
    return kernel.run(*arguments, eps=eps)  # type: ignore[no-any-return]


@fp8_normed.register_fake
def _(
    x: Tensor,
    x_descale: Tensor,
    squares: Tensor,
    weights: list[Tensor],
    descales: list[Tensor],
    dtype: torch.dtype,
    *,
    eps: float,
    impl: str = "auto",
) -> Tensor:
    return x.new_empty((x.shape[0], sum(w.shape[0] for w in weights)), dtype=dtype)


def _check(x: Tensor, x_descale: Tensor, squares: Tensor, weights: list[Tensor], descales: list[Tensor]) -> None:
    several = len(weights) == 2 and weights[0].shape[0] % SCALE_GROUP == 0
    if not (several or len(weights) == 1) or len(weights) != len(descales) or any(w.dim() != 2 for w in weights):
        raise UnsupportedInputError(
            f"fp8_normed: got weights {[list(w.shape) for w in weights]} with {len(descales)} scales; expected one or "
            f"two [N, K], the first of two with N in multiples of {SCALE_GROUP}, and their scales"
        )
    for weight, descale in zip(weights, descales, strict=True):
        check_weight("fp8_normed", weight, descale)
        check_left("fp8_normed", x, x_descale, weight)
    want = (x.shape[0], -(-x.shape[1] // STRETCH))
    if squares.shape != want or squares.dtype != torch.float32:
        raise UnsupportedInputError(
            f"fp8_normed: got squares of {squares.dtype} {list(squares.shape)}; expected torch.float32 {list(want)}, "
            f"a sum for every {STRETCH} values of a row"
        )
