"""``mlacompile::fp8_linear_parts``: the products of ``fp8_linear`` over parts of K, not added up.

    out[p] = x[:, part p] @ weight[:, part p].T          fp8_linear(…) = Σ_p out[p]

for a result of 16 bits: a kernel may sum in the bits that the tensor cores keep of FP8 products.

A weight with few rows is read by all of a device only in parts of K. Whoever reads the result next can add them up
on the way: ``quantize_rows`` does, which spares a launch and a pass over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP, filled_parts, scale_groups
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import check_left, check_weight, fp8_linear_reference


def fp8_linear_parts_reference(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, parts: int
) -> Tensor:
    """The definition: a product for every part."""
    groups = -(-scale_groups(x.shape[1]) // parts)
    columns = groups * SCALE_GROUP
    pieces = zip(
        x.split(columns, 1), x_descale.split(groups, 1), weight.split(columns, 1), weight_descale.split(groups, 1),
        strict=True,
    )  # fmt: skip
    return torch.stack([fp8_linear_reference(*piece, torch.float32) for piece in pieces])


@torch.library.custom_op("mlacompile::fp8_linear_parts", mutates_args=())
def fp8_linear_parts(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, parts: int, *, impl: str = "auto"
) -> Tensor:
    """Products of FP8 rows and an FP8 weight over parts of K.

    Args:
        x, x_descale, weight, weight_descale: as in ``fp8_linear``, x quantized and without heads.
        parts: how many, each of ``⌈G / parts⌉`` of the G blocks of K; none may be empty.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        float32 ``[parts, M, N]``, contiguous.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together, parts that would be empty, or a named kernel
            that cannot take them.
    """
    check_weight("fp8_linear_parts", weight, weight_descale)
    check_left("fp8_linear_parts", x, x_descale, weight)
    check_parts("fp8_linear_parts", x, parts)
    kernel = registry.chosen("fp8_linear_parts", impl, x, x_descale, weight, weight_descale, parts)
    if kernel is None:
        return fp8_linear_parts_reference(x, x_descale, weight, weight_descale, parts)
    return kernel.run(x, x_descale, weight, weight_descale, parts)  # type: ignore[no-any-return]


@fp8_linear_parts.register_fake
def _(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, parts: int, *, impl: str = "auto"
) -> Tensor:
    return x.new_empty((parts, x.shape[0], weight.shape[0]), dtype=torch.float32)


def check_parts(op: str, x: Tensor, parts: int) -> None:
    """Raise UnsupportedInputError unless x ``[M, K]`` can be cut in so many parts."""
    groups = scale_groups(x.shape[-1])
    if x.dim() != 2 or parts < 1 or filled_parts(groups, parts) != parts:
        raise UnsupportedInputError(
            f"{op}: got x {list(x.shape)} in {parts} parts; expected [M, K] in parts of equally many of its {groups} "
            "blocks, none of them empty"
        )
