"""``mlacompile::attention``: the one form every spelling of attention is brought into before anything is recognised.

It is ordinary scaled dot product attention with unequal head sizes allowed. It exists so that attention stays one node
while AOTAutograd takes the rest of the graph apart; a node of it that is not rewritten becomes what it was again.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mlacompile::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    sink: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v.

    Args:
        q: ``[B, H, S, D]``. k: ``[B, H, T, D]``. v: ``[B, H, T, V]`` (fewer heads in k and v with ``enable_gqa``).
        mask: broadcasts to ``[B, H, S, T]``; bool (True attends) or additive.
        is_causal: token t is seen by query s iff t <= s.
        sink: broadcasts to ``[B, H, S, 1]``: a score that takes part in the softmax and has no value.
    Returns:
        ``[B, H, S, V]``, dtype of q.
    """
    if sink is not None:
        return _with_sink(q, k, v, mask, is_causal, scale, enable_gqa, sink)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    ).contiguous()


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    sink: Tensor | None = None,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    sink: Tensor,
) -> Tensor:
    """Written out, because no library attention takes a sink."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    scores = torch.cat((scores, sink.expand(*scores.shape[:-1], 1)), -1)
    return (scores.softmax(-1)[..., :-1].to(v.dtype) @ v).contiguous()
