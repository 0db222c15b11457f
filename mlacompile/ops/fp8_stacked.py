"""``mlacompile::fp8_stacked``: ``fp8_linear`` by two weights that multiply the same x, in one launch.

    out[:, : n₀] = fp8_linear(x, …, w₀, …)        out[:, n₀ :] = fp8_linear(x, …, w₁, …)

A gate and what it gates, two down-projections of one hidden state: with few rows each is a launch that reads memory for
some microseconds, and the ends of launches are time in which nothing is read. The weights stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import check_left, check_weight, fp8_linear_reference


def fp8_stacked_reference(
    x: Tensor, x_descale: Tensor | None, weights: list[Tensor], descales: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """The definition: one product after the other, side by side."""
    products = (fp8_linear_reference(x, x_descale, w, s, dtype) for w, s in zip(weights, descales, strict=True))
    return torch.cat(list(products), dim=-1)


@torch.library.custom_op("mlacompile::fp8_stacked", mutates_args=())
def fp8_stacked(
    x: Tensor,
    x_descale: Tensor | None,
    weights: list[Tensor],
    descales: list[Tensor],
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> Tensor:
    """``x @ torch.cat(weights).T`` with weights in FP8, and x in FP8 or not.

    Args:
        x, x_descale, dtype: as in ``fp8_linear``, without heads.
        weights: two, e4m3 ``[Nᵢ, K]``, N₀ a multiple of 128. descales: float32 ``[⌈Nᵢ / 128⌉, ⌈K / 128⌉]``.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[M, N₀ + N₁]`` in ``dtype``, summed in float32, contiguous.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together, or a named kernel that cannot take them.
    """
    check_stack("fp8_stacked", x, x_descale, weights, descales, {2: "two"})
    arguments = (x, x_descale, weights, descales, dtype)
    kernel = registry.chosen("fp8_stacked", impl, *arguments)
    if kernel is None:
        return fp8_stacked_reference(*arguments)
    return kernel.run(*arguments)  # type: ignore[no-any-return]


@fp8_stacked.register_fake
def _(
    x: Tensor,
    x_descale: Tensor | None,
    weights: list[Tensor],
    descales: list[Tensor],
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> Tensor:
    return x.new_empty((x.shape[0], sum(w.shape[0] for w in weights)), dtype=dtype)


def check_stack(
    op: str, x: Tensor, x_descale: Tensor | None, weights: list[Tensor], descales: list[Tensor], counts: dict[int, str]
) -> None:
    """Raise UnsupportedInputError unless x can be multiplied with these weights in one launch. counts: how many there
    may be, and these numbers in words."""
    apart = any(len(w) % SCALE_GROUP for w in weights[:-1])
    if len(weights) not in counts or len(descales) != len(weights) or any(w.dim() != 2 for w in weights) or apart:
        raise UnsupportedInputError(
            f"{op}: got weights {[list(w.shape) for w in weights]} with {len(descales)} scales; expected "
            f"{' or '.join(counts.values())} [N, K], the first of two of N in multiples of {SCALE_GROUP}, and their "
            "scales"
        )
    for weight, descale in zip(weights, descales, strict=True):
        check_weight(op, weight, descale)
        check_left(op, x, x_descale, weight)
