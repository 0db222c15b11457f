"""Which cached tokens a query sees: the arguments that say so, as one mask. Ops and kernels agree on it here."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_tokens(
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    causal: bool,
    *,
    queries: int,
    tokens: int,
    device: torch.device,
) -> Tensor | None:
    """Which cached tokens each query may see: bool, broadcastable to [B, S, T]; None when every query sees all."""
    token = torch.arange(tokens, device=device)
    conditions: list[Tensor] = []
    if start is not None:
        conditions.append(token >= start[:, None, None])
    if causal and queries > 1:
        query = torch.arange(queries, device=device).view(1, -1, 1)
        end = length[:, None, None] if length is not None else tokens
        conditions.append(token <= end - queries + query)
    elif length is not None:
        conditions.append(token < length[:, None, None])
    if mask is not None:
        conditions.append(mask if mask.dtype == torch.bool else mask != -math.inf)
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible
