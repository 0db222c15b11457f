"""Attention over heads that also yields log-sum-exps: whichever of PyTorch's own kernels takes the inputs.

On CUDA that is cuDNN, which takes unequal head sizes (192 and 128) as they are and is the fastest there, or the
memory-efficient one under a mask; on a CPU flash attention on values padded to the head size of keys; else plain
products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

aten = torch.ops.aten

#: Stands for -inf under a mask: no score survives it, and a query that sees nothing of a chunk yields no NaN.
_LOW = {torch.float16: -6e4}
_ALIGNED = 16  # elements that the rows of a mask start at multiples of, for the memory-efficient kernel


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, added: Tensor | None, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + mask) v and its log-sum-exp ``[B, H, S]``, in at least float32.

    Args:
        q ``[B, H, S, D]``, k ``[B, H, C, D]``, v ``[B, H, C, V]``.
        visible: bool ``[B|1, S|1, C]``. added: ``[B|1, S|1, C|1]``, added to the scores. None: nothing hidden,
        nothing added.
        causal: a square: query s sees t <= s. Not together with a mask.
    """
    bias = _bias(q, k.shape[2], visible, added)
    if q.is_cuda:
        if bias is None and _cudnn_takes(q, k, v, causal):
            out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[
                :2
            ]
        elif q.dtype is not torch.float64:
            out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
            lse = lse[..., : q.shape[2]]  # padded to whole tiles
        else:
            out, lse = _plain(q, k, v, bias, causal, scale)
    elif q.device.type == "cpu" and hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        out, lse = _cpu(q, k, v, bias, causal, scale)
    else:
        out, lse = _plain(q, k, v, bias, causal, scale)
    lse = lse.reshape(q.shape[:3])
    if visible is None:
        return out, lse
    blind = ~visible.any(dim=2).unsqueeze(1)  # [B|1, 1, S|1]
    return out.masked_fill(blind.unsqueeze(3), 0.0), lse.masked_fill(blind, -math.inf)


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def _bias(q: Tensor, tokens: int, visible: Tensor | None, added: Tensor | None) -> Tensor | None:
    """What is added to the scores, as ``[B, H, S, C]`` of which heads (and whatever was of size one) share the
    memory."""
    if visible is None and added is None:
        return None
    low = _LOW.get(q.dtype, torch.finfo(q.dtype).min / 2)
    sizes = [x.shape for x in (visible, added) if x is not None]
    batch, queries = (max(shape[i] for shape in sizes) for i in (0, 1))
    padded = -(-tokens // _ALIGNED) * _ALIGNED
    bias = torch.zeros(batch, 1, queries, padded, dtype=q.dtype, device=q.device)[..., :tokens]
    if added is not None:
        bias += added.unsqueeze(1).clamp(min=low).to(q.dtype)
    if visible is not None:
        bias.masked_fill_(~visible.unsqueeze(1), low)
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], tokens)


def _cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention for CPUs, which wants one head size for all three."""
    width = max(q.shape[3], v.shape[3])
    padded = [torch.nn.functional.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v)]
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*padded, 0.0, causal, attn_mask=bias, scale=scale)
    return out[..., : v.shape[3]], lse


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(2, 3)).to(compute) * scale
    if bias is not None:
        scores += bias
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1)
    return (torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype) @ v), lse
