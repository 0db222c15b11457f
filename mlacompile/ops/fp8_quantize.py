"""``mlacompile::fp8_quantize`` and ``fp8_dequantize``: eight-bit floats with one float32 scale a group of values.

    descale = max |x| of the group / largest finite value of the FP8 type        always multiplies on read
    q       = x / descale, rounded to nearest even                                x ≈ q · descale

A group is a run of the last dimension; the last one may be short. With 128 values a group this is what DeepSeek-V3 does
to activations (arXiv 2412.19437, section 3.3.2) and FlashMLA to latents. The rest of the definition is in what happens
at the ends of the range:

- a group of zeros has a descale of 1 and reads back as zeros, signs kept;
- descale is never below 2**-126, the smallest normal float32, so that no device can flush it to zero. Groups smaller
  than that allows lose precision, then read back as zeros; nothing is divided by zero;
- a group with an infinity or a NaN in it has a NaN for descale and reads back as NaN, every value of it. The cast alone
  would turn an infinity into the largest finite value, and nobody would know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import scale_groups

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
#: The smallest descale: the smallest normal float32.
SMALLEST_DESCALE = 2.0**-126


def fp8_quantize_reference(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; shapes as in :func:`fp8_quantize`."""
    parts = [_quantize_groups(part, dtype) for part in in_groups(x, group)]
    return torch.cat([q.flatten(-2) for q, _ in parts], dim=-1), torch.cat([d for _, d in parts], dim=-1)


def fp8_dequantize_reference(q: Tensor, descale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch; shapes as in :func:`fp8_dequantize`. One rounding, to ``dtype``, after a float32
    product."""
    parts, at = [], 0
    for part in in_groups(q, group):
        scales = descale[..., at : at + part.shape[-2], None]
        parts.append((part.to(torch.float32) * scales).flatten(-2).to(dtype))
        at += part.shape[-2]
    return torch.cat(parts, dim=-1)


def _quantize_groups(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x ``[…, groups, group]`` → q of that shape and descale ``[…, groups]``."""
    x = x.to(torch.float32)
    descale = descale_of(x.abs().amax(dim=-1), dtype)
    return rounded(x, descale.unsqueeze(-1), dtype), descale


def descale_of(peak: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor that multiplies on read, for groups whose largest absolute value is ``peak`` (float32)."""
    descale = torch.where(peak == 0, 1.0, (peak / torch.finfo(dtype).max).clamp(min=SMALLEST_DESCALE))
    return torch.where(peak.isfinite(), descale, torch.nan)


def rounded(x: Tensor, descale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / descale`` in FP8. The quotient of the largest value may come out just above the range, which a cast need
    not saturate."""
    largest = torch.finfo(dtype).max
    return (x / descale).clamp(-largest, largest).to(dtype)


def in_groups(x: Tensor, group: int) -> list[Tensor]:
    """``[…, W]`` as ``[…, groups, group]``, and what is left over as one shorter group.

    Not padded to whole groups: Inductor's C++ loops over a padded and cropped last dimension leave its end unwritten
    (torch 2.13).
    """
    width = x.shape[-1]
    whole = width // group * group
    parts = [x[..., :whole].unflatten(-1, (whole // group, group))] if whole else []
    return parts if whole == width else [*parts, x[..., whole:].unsqueeze(-2)]


@torch.library.custom_op("mlacompile::fp8_quantize", mutates_args=())
def fp8_quantize(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize to FP8 with one scale for every ``group`` values of the last dimension.

    Args:
        x: ``[…, W]``, floating point. group: values that share a scale; W when it is larger.
        dtype: torch.float8_e4m3fn (largest value 448) or torch.float8_e5m2 (57344).
    Returns:
        q ``[…, W]`` in ``dtype`` and descale ``[…, ⌈W / group⌉]`` in float32, both contiguous.
        ``|x - q · descale| <= max(u |x|, s · descale / 2)`` up to rounding of the product in float32, where u is half
        the spacing of the type relative to its values (2**-4, 2**-3) and s its smallest positive value (2**-9, 2**-16).
    Raises:
        UnsupportedInputError: x is no float, group is not positive, or dtype is not FP8.
    """
    _check_group(group)
    _check_fp8("fp8_quantize", dtype)
    if not x.is_floating_point():
        raise UnsupportedInputError(f"fp8_quantize: got x of {x.dtype}; expected a floating point tensor")
    return fp8_quantize_reference(x, group, dtype)


@fp8_quantize.register_fake
def _(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((*x.shape[:-1], scale_groups(x.shape[-1], group)), dtype=torch.float32),
    )


@torch.library.custom_op("mlacompile::fp8_dequantize", mutates_args=())
def fp8_dequantize(q: Tensor, descale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The values that :func:`fp8_quantize` stored: ``q · descale``.

    Args:
        q: ``[…, W]``, FP8. descale: float32 ``[…, ⌈W / group⌉]``. Any strides.
        dtype: of the result.
    Returns:
        ``[…, W]`` in ``dtype``, contiguous.
    Raises:
        UnsupportedInputError: q is not FP8, descale is not float32, or is not one value a group.
    """
    _check_group(group)
    _check_fp8("fp8_dequantize", q.dtype)
    want = (*q.shape[:-1], scale_groups(q.shape[-1], group))
    if descale.dtype != torch.float32 or tuple(descale.shape) != want:
        raise UnsupportedInputError(
            f"fp8_dequantize: got a descale of {descale.dtype} {list(descale.shape)} for q {list(q.shape)} in groups "
            f"of {group}; expected torch.float32 {list(want)}. It multiplies: pass 1 / scale if yours divides."
        )
    return fp8_dequantize_reference(q, descale, group, dtype)


@fp8_dequantize.register_fake
def _(q: Tensor, descale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


def _check_group(group: int) -> None:
    if group < 1:
        raise UnsupportedInputError(f"got a group of {group}; expected how many values share a scale, at least 1")


def _check_fp8(op: str, dtype: torch.dtype) -> None:
    if dtype not in FP8_DTYPES:
        raise UnsupportedInputError(f"{op}: got {dtype}; expected {' or '.join(map(str, FP8_DTYPES))}")
