"""``mlacompile::stored``: the value itself, written to memory where a compiler would rather compute it again."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mlacompile::stored", mutates_args=())
def stored(x: Tensor) -> Tensor:
    """``x``, any shape and dtype, in memory of its own."""
    return x.clone()


@stored.register_fake
def _stored_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)
