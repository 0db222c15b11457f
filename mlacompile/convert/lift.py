"""The lossless lift: grouped-query attention written as latent attention, with the same cache and the same scores.

All rotated keys of a token are its ``k_pe``, all its values are its ``c_kv``; each query head has its rows in the lanes
of its group and zeros in the others. Nothing is rounded: weights are copied, reordered and surrounded by zeros. The
cache is as large as before; this is the form that compression starts from, and the proof that everything else is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.convert.form import GQALayer, MLALayer

#: Lanes of zeros that make keys depend on the latent, as latent attention is known by. Sixteen fill a tile.
NOPE_LANES = 16


def lift(layer: GQALayer, *, nope: int = NOPE_LANES) -> MLALayer:
    """The same attention in latent form: R = P = G·D, V = D, N = ``nope`` lanes of zeros."""
    heads, d, hidden = layer.w_q.shape
    groups = layer.w_k.shape[0]
    order = interleaved(d).to(layer.w_q.device)
    w_q = layer.w_q.new_zeros(heads, nope + groups * d, hidden)
    w_uv = layer.w_v.new_zeros(heads, d, groups * d)
    b_q = None if layer.b_q is None else layer.b_q.new_zeros(heads, nope + groups * d)
    for h in range(heads):
        lanes = slice((h * groups // heads) * d, (h * groups // heads + 1) * d)
        w_q[h, nope:][lanes] = layer.w_q[h, order]
        w_uv[h, :, lanes].fill_diagonal_(1.0)
        if b_q is not None and layer.b_q is not None:
            b_q[h, nope:][lanes] = layer.b_q[h, order]
    return MLALayer(
        w_q=w_q,
        w_dkv=layer.w_v.reshape(groups * d, hidden),
        w_kr=layer.w_k[:, order].reshape(groups * d, hidden),
        w_uk=layer.w_k.new_zeros(heads, nope, groups * d),
        w_uv=w_uv,
        w_o=layer.w_o,
        b_q=b_q,
        b_dkv=None if layer.b_v is None else layer.b_v.reshape(-1),
        b_kr=None if layer.b_k is None else layer.b_k[:, order].reshape(-1),
        b_o=layer.b_o,
        inv_freq=layer.inv_freq.repeat(groups),
        scale=layer.scale,
    )


def interleaved(d: int) -> Tensor:
    """Lanes in the order that turns rotate_half pairs (i, i + D/2) into neighbours (2i, 2i + 1)."""
    return torch.arange(d).view(2, d // 2).T.reshape(-1)
