"""``fp8_linear`` by cuBLASLt, through ``torch.nn.functional.scaled_mm``: best where tensor cores are the limit."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_UNIT = 4  # rows of x come in multiples of this


def fp8_linear_blas(x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype) -> Tensor:
    """The op for inputs that ``blas_reasons`` has nothing against."""
    from torch.nn.functional import ScalingType, scaled_mm

    rows = x.shape[0]
    padded = -rows % ROW_UNIT
    if padded:
        x, x_descale = (torch.nn.functional.pad(t, (0, 0, 0, padded)) for t in (x.view(torch.uint8), x_descale))
        x = x.view(weight.dtype)
    blocks = weight_descale.shape[1]
    if blocks % 4:  # cuBLASLt wants rows of scales in multiples of four
        weight_descale = torch.nn.functional.pad(weight_descale, (0, -blocks % 4))
    out = scaled_mm(
        x.contiguous(),
        weight.t(),
        x_descale.t().contiguous().t(),
        ScalingType.BlockWise1x128,
        weight_descale.contiguous().t(),
        ScalingType.BlockWise128x128,
        output_dtype=dtype,
    )
    return out[:rows]
