"""``mlacompile::row_product``: one row times a weight, as every product of a decode step for one sequence is.

Each weight is read once to be used once, so the only thing that counts is how fast it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry


def row_product_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x ``[1, K]`` times weight ``[N, K]`` transposed."""
    return x @ weight.t()


@torch.library.custom_op("mlacompile::row_product", mutates_args=())
def row_product(x: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """``x @ weight.T`` for a single row.

    Args:
        x: ``[1, K]``. weight: ``[N, K]``, rows contiguous, any distance between them; same dtype as x.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[1, N]`` in the dtype of x, accumulated in float32.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together, or a named kernel that cannot take them.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[0] != 1 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise UnsupportedInputError(
            f"row_product: got x {x.dtype} {list(x.shape)} and weight {weight.dtype} {list(weight.shape)}; "
            "expected [1, K] and [N, K] of one dtype"
        )
    for kernel in registry.kernels("row_product"):
        if impl in ("auto", kernel.name):
            reasons = kernel.supports(x, weight)
            if not reasons:
                return kernel.run(x, weight)  # type: ignore[no-any-return]
            if impl == kernel.name:
                raise UnsupportedInputError(
                    f"row_product: kernel {impl!r} cannot take these inputs: {'; '.join(reasons)}"
                )
    return row_product_reference(x, weight)


@row_product.register_fake
def _(x: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    return x.new_empty((1, weight.shape[0]))
