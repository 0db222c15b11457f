"""``mlacompile::head_product``: one row a head times that head's matrix, as both absorbed products of one sequence are.

    q_latent[h] = q_nope[h] · w_uk[h]          out[h] = o_latent[h] · w_uv[h]ᵀ

A batched matrix product of one row each: every weight is read once to be used once, in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry


def head_product_reference(x: Tensor, weight: Tensor, *, early: bool = False) -> Tensor:
    """The definition, in float32 or wider, rounded once at the end."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return torch.bmm(x.to(compute), weight.to(compute)).to(x.dtype)


@torch.library.custom_op("mlacompile::head_product", mutates_args=())
def head_product(x: Tensor, weight: Tensor, *, early: bool = False, impl: str = "auto") -> Tensor:
    """``bmm`` of one row each.

    Args:
        x: ``[H, 1, K]``. weight: ``[H, K, N]``, any strides; same dtype.
        early: whether nothing on this stream still writes the weight, as it is with a parameter: a kernel may then read
            it before what was launched earlier has ended.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[H, 1, N]``, contiguous, in the dtype of x, computed in float32 and rounded once.
    Raises:
        UnsupportedInputError: inputs that do not fit together, or a named kernel that cannot take them.
    """
    if x.dim() != 3 or weight.dim() != 3 or x.shape != (weight.shape[0], 1, weight.shape[1]) or x.dtype != weight.dtype:
        raise UnsupportedInputError(
            f"head_product: got x {x.dtype} {list(x.shape)} and weight {weight.dtype} {list(weight.shape)}; "
            "expected [H, 1, K] and [H, K, N] of one dtype"
        )
    kernel = registry.chosen("head_product", impl, x, weight, early=early)
    if kernel is None:
        return head_product_reference(x, weight)
    return kernel.run(x, weight, early=early)  # type: ignore[no-any-return]


@head_product.register_fake
def _(x: Tensor, weight: Tensor, *, early: bool = False, impl: str = "auto") -> Tensor:
    return x.new_empty((x.shape[0], 1, weight.shape[2]))
