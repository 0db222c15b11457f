"""Where in the arrays of a cache the parts of a token lie."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.geometry import scale_groups


def destinations(
    c_cache: Tensor, k_cache: Tensor | None, descale: Tensor | None, rank: int, rope: int,
    *, stored: torch.dtype, rope_stored: torch.dtype, group: int, scale_at: int, rope_at: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Views of the arrays: latents ``[B, T, R]``, rotary keys ``[B, T, P]``, scales ``[B, T, G]``."""
    rows, keys, scales = _rows(c_cache), None, None
    if rope:
        keys = _part(rows, rope_stored, rope_at, rope) if k_cache is None else _rows(k_cache).view(rope_stored)
    if group and descale is None:
        scales = _part(rows, torch.float32, scale_at, scale_groups(rank, group))
    elif group:
        scales = _rows(descale)  # type: ignore[arg-type]
    return _part(rows, stored, 0, rank), keys, scales


def _rows(cache: Tensor) -> Tensor:
    """``[B, T, ·]`` of that or of ``[B, 1, T, ·]``."""
    return cache[:, 0] if cache.dim() == 4 else cache


def _part(rows: Tensor, dtype: torch.dtype, at: int, width: int) -> Tensor:
    """``width`` values that begin ``at`` so many bytes in a row."""
    at //= dtype.itemsize
    return rows.view(dtype)[..., at : at + width]
