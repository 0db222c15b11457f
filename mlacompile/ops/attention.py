"""``mlacompile::attention``: the one form every spelling of attention is brought into before anything is recognised.

It is ordinary scaled dot product attention with unequal head sizes allowed. It exists so that attention stays one node
while AOTAutograd takes the rest of the graph apart; a node of it that is not rewritten becomes what it was again.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mlacompile::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v.

    Args:
        q: ``[B, H, S, D]``. k: ``[B, H, T, D]``. v: ``[B, H, T, V]`` (fewer heads in k and v with ``enable_gqa``).
        mask: broadcasts to ``[B, H, S, T]``; bool (True attends) or additive.
        is_causal: token t is seen by query s iff t <= s.
    Returns:
        ``[B, H, S, V]``, dtype of q.
    """
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    ).contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
