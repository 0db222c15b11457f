"""``mlacompile::fp8_normed``: FP8 products of rows that an RMS norm stands before, and its root behind them.

    out = (x @ weight.T) / √(mean(row²) + eps)

``quantize_rows(..., squares=True)`` leaves the root out: it is one factor of a row, which the product can take as well,
and finding it first would have every row wait for all of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear_parts import check_parts, fp8_linear_parts_reference
from mlacompile.ops.fp8_stacked import check_stack, fp8_stacked_reference
from mlacompile.ops.quantize_rows import STRETCH


def fp8_normed_reference(
    x: Tensor, x_descale: Tensor, squares: Tensor, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype,
    *, eps: float, parts: int = 1,
) -> Tensor:  # fmt: skip
    """The definition, in float32 up to the root."""
    root = torch.rsqrt(squares.sum(-1, keepdim=True) / x.shape[1] + eps)
    if parts == 1:
        return (fp8_stacked_reference(x, x_descale, weights, descales, torch.float32) * root).to(dtype)
    each = [fp8_linear_parts_reference(x, x_descale, w, s, parts) for w, s in zip(weights, descales, strict=True)]
    return torch.cat(each, -1) * root


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
    parts: int = 1,
    impl: str = "auto",
) -> Tensor:
    """``x @ torch.cat(weights).T``, each row divided by the root of its mean square.

    Args:
        x: e4m3 ``[M, K]``. x_descale: float32 ``[M, ⌈K / 128⌉]``. squares: float32 ``[M, ⌈K / STRETCH⌉]``; all from
            ``quantize_rows(..., squares=True)``.
        weights: one or two, e4m3 ``[Nᵢ, K]``, the first of two with N in multiples of 128. descales: theirs, float32
            ``[⌈Nᵢ / 128⌉, ⌈K / 128⌉]``.
        dtype: of the result. eps: of the norm.
        parts: with more than one, K is cut as in ``fp8_linear_parts``, and they are not added up.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[M, ΣNᵢ]`` in ``dtype``, summed in float32, or float32 ``[parts, M, ΣNᵢ]``; contiguous.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together, or a named kernel that cannot take them.
    """
    check_stack("fp8_normed", x, x_descale, weights, descales, {1: "one", 2: "two"})
    want = (x.shape[0], -(-x.shape[1] // STRETCH))
    if squares.shape != want or squares.dtype != torch.float32:
        raise UnsupportedInputError(
            f"fp8_normed: got squares of {squares.dtype} {list(squares.shape)}; expected torch.float32 {list(want)}, "
            f"a sum for every {STRETCH} values of a row"
        )
    check_parts("fp8_normed", x, parts)
    arguments = (x, x_descale, squares, weights, descales, dtype)
    kernel = registry.chosen("fp8_normed", impl, *arguments, eps=eps, parts=parts)
    if kernel is None:
        return fp8_normed_reference(*arguments, eps=eps, parts=parts)
    return kernel.run(*arguments, eps=eps, parts=parts)  # type: ignore[no-any-return]


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
    parts: int = 1,
    impl: str = "auto",
) -> Tensor:
    shape = (x.shape[0], sum(w.shape[0] for w in weights))
    return x.new_empty(shape, dtype=dtype) if parts == 1 else x.new_empty((parts, *shape), dtype=torch.float32)
