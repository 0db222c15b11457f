"""``mlacompile::fp8_experts``: every row times the weight of its own expert, in FP8 with the scales of ``fp8_linear``.

    y[m, n] = Σ_g  x_descale[m, g] · descale[e, n / 128, g] · Σ_{k in g} x[m, k] · weight[e, n, k],    e = expert[m]

Rows need not be in the order of their experts. Without a kernel it is asked on the host which experts have rows, and no
CUDA graph can replay that; where a kernel takes the inputs, compiled graphs have ``fp8_experts_placed``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import scale_groups
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import E4M3, check_weight, fp8_linear_reference


def fp8_experts_reference(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, expert: Tensor, dtype: torch.dtype
) -> Tensor:
    """The op in plain PyTorch: one product an expert that has rows."""
    out = x.new_zeros((x.shape[0], weight.shape[1]), dtype=dtype)
    for e in expert.unique().tolist():
        if 0 <= e < weight.shape[0]:
            rows = (expert == e).nonzero().squeeze(1)
            picked = x.view(torch.uint8)[rows].view(E4M3)
            out[rows] = fp8_linear_reference(picked, x_descale[rows], weight[e], weight_descale[e], dtype)
    return out


def _experts(
    x: Tensor,
    x_descale: Tensor,
    weight: Tensor,
    weight_descale: Tensor,
    expert: Tensor,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> Tensor:
    """``x[m] @ weight[expert[m]].T`` of scaled FP8 factors.

    Args:
        x: e4m3 ``[M, K]``. x_descale: float32 ``[M, ⌈K / 128⌉]``: both from ``fp8_quantize(x, 128, …)``.
        weight: e4m3 ``[E, N, K]``. weight_descale: float32 ``[E, ⌈N / 128⌉, ⌈K / 128⌉]``.
        expert: integers ``[M]``. Rows whose expert is not one of the E are zero.
        dtype: of the result.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[M, N]`` in ``dtype``, summed in float32.
    Raises:
        UnsupportedInputError: shapes or dtypes that do not fit together, or a named kernel that cannot take them.
    """
    _check(x, x_descale, weight, weight_descale, expert)
    arguments = (x, x_descale, weight, weight_descale, expert, dtype)
    kernel = registry.chosen("fp8_experts", impl, *arguments)
    if kernel is None:
        return fp8_experts_reference(*arguments)
    return kernel.run(*arguments)  # type: ignore[no-any-return]


def _check(x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, expert: Tensor) -> None:
    check_weight("fp8_experts", weight, weight_descale)
    groups = scale_groups(weight.shape[-1])
    fits = weight.dim() == 3 and x.dim() == 2 and x.dtype == E4M3 and x.shape[1] == weight.shape[2]
    if not fits or tuple(x_descale.shape) != (x.shape[0], groups) or tuple(expert.shape) != (x.shape[0],):
        raise UnsupportedInputError(
            f"fp8_experts: got x of {x.dtype} {list(x.shape)} with scales {list(x_descale.shape)} and experts "
            f"{list(expert.shape)} for weights {list(weight.shape)}; expected {E4M3} [M, K] with [M, {groups}] and [M] "
            "for [E, N, K]"
        )


def _fake(
    x: Tensor, _x_descale: Tensor, weight: Tensor, _descale: Tensor, _expert: Tensor, dtype: torch.dtype, **_: Any
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=dtype)


fp8_experts = torch.library.custom_op(
    "mlacompile::fp8_experts", _experts, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
#: The same with a kernel named: which experts have rows stays on the device, so a CUDA graph can replay it.
fp8_experts_placed = torch.library.custom_op("mlacompile::fp8_experts_placed", _experts, mutates_args=())
for _op in (fp8_experts, fp8_experts_placed):
    _op.register_fake(_fake)
