"""``mlacompile::row_product``: one row times weights, as every product of a decode step for one sequence is.

Each weight is read once to be used once, so the only thing that counts is how fast it is read. Weights that multiply
the same row are one call: one launch then reads them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry


def row_product_reference(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x ``[1, K]`` times each weight ``[N, K]`` transposed."""
    return [x @ weight.t() for weight in weights]


@torch.library.custom_op("mlacompile::row_product", mutates_args=())
def row_product(x: Tensor, weights: list[Tensor], *, impl: str = "auto") -> list[Tensor]:
    """``x @ weight.T`` of a single row, for every weight.

    Args:
        x: ``[1, K]``. weights: each ``[N, K]``, rows contiguous, any distance between them; same dtype as x.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[1, N]`` for each weight in the dtype of x, accumulated in float32.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together, or a named kernel that cannot take them.
    """
    for weight in weights:
        if x.dim() != 2 or weight.dim() != 2 or x.shape != (1, weight.shape[1]) or x.dtype != weight.dtype:
            raise UnsupportedInputError(
                f"row_product: got x {x.dtype} {list(x.shape)} and weight {weight.dtype} {list(weight.shape)}; "
                "expected [1, K] and [N, K] of one dtype"
            )
    for kernel in registry.kernels("row_product"):
        if impl in ("auto", kernel.name):
            reasons = kernel.supports(x, weights)
            if not reasons:
                return kernel.run(x, weights)  # type: ignore[no-any-return]
            if impl == kernel.name:
                raise UnsupportedInputError(
                    f"row_product: kernel {impl!r} cannot take these inputs: {'; '.join(reasons)}"
                )
    return row_product_reference(x, weights)


@row_product.register_fake
def _(x: Tensor, weights: list[Tensor], *, impl: str = "auto") -> list[Tensor]:
    return [x.new_empty((1, weight.shape[0])) for weight in weights]
