"""What a layer's attention looks at on real text: a sample of (query, key) pairs.

A compressed layer errs in scores and in values. How much an error of a query's scores moves the layer's output is
bounded by the spread of the values it looks at (Cauchy-Schwarz),

    ‖Σⱼ pⱼ δsⱼ W_O vⱼ‖² ≤ Var_p(δs) · Var_p(W_O v)      (a shift of all scores is free)

so the second factor weighs the query. The bound holds for small errors. Keys that no attention goes to may err
downwards as far as they like, but not upwards: so only some keys are drawn as attention draws them, the rest evenly.
Half of those stand at a distance of their own, up to ``reach``: keys before rotation know no position, and what was
fitted at short distances only is wrong without bounds at longer ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlacompile.convert.attend import project, rotate_halves, rotation
from mlacompile.convert.form import GQALayer


@dataclass(frozen=True)
class Pairs:
    """A layer's sample: Q queries a head, K keys each. Bounded by the sample's size, not by the text's."""

    k: Tensor  # [tokens, G, D] keys before rotation
    v: Tensor  # [tokens, G, D]
    token: Tensor  # [H, Q, K] index of the key's token; the first ``attended`` are drawn by attention, the rest evenly
    attended: int
    distance: Tensor  # [H, Q, K] positions between query and key, float
    weight: Tensor  # [H, Q] variance of W_O v over those keys: the output's squared change a unit of score variance
    query: Tensor  # [H, D, D] second moment of the queries before rotation, weighted
    mixed: Tensor  # [2 G D, 2 G D] covariance of what attention mixes of [k; v], all heads
    output: float  # mean squared norm of what attention adds to the residual stream


def sample_pairs(
    layer: GQALayer,
    x: Tensor,
    *,
    queries: int = 48,
    keys: int = 16,
    even: float = 0.125,
    reach: int = 0,
    seed: int = 0,
) -> Pairs:
    """Draw from windows ``x [W, T, M]`` of the layer's input, one window at a time; float32.

    ``even`` is the share of the keys that are drawn evenly. If ``reach`` is more than a window, every second of them
    (the first is one) is put at a distance that is drawn evenly up to it.
    """
    attended = keys - round(even * keys)
    generator = torch.Generator().manual_seed(seed)
    length = x.shape[1]
    heads, groups = layer.w_q.shape[0], layer.w_k.shape[0]
    group_of = torch.arange(heads, device=x.device) // (heads // groups)
    turned = rotation(layer.inv_freq, length)
    through = torch.einsum("mhd,mhe->hde", layer.w_o, layer.w_o)  # ‖W_O v‖² = vᵀ through v
    kept: dict[str, list[Tensor]] = {name: [] for name in ("k", "v", "token", "distance", "weight")}
    query = torch.zeros(heads, layer.w_q.shape[1], layer.w_q.shape[1], dtype=torch.float64, device=x.device)
    size = 2 * groups * layer.w_k.shape[1]
    mixed_sum, mixed_square, output = x.new_zeros(size), x.new_zeros(size, size), 0.0
    for window, tokens in enumerate(x):
        hidden = tokens[None].float()
        k, v = (project(hidden, w, b)[0] for w, b in ((layer.w_k, layer.b_k), (layer.w_v, layer.b_v)))
        # Position 0 sees one key only: nothing there can go wrong.
        at = (torch.randperm(length - 1, generator=generator)[:queries] + 1).sort().values.to(x.device)
        q = project(hidden[:, at], layer.w_q, layer.b_q)[0]  # [H, Q, D]
        turned_keys = rotate_halves(k[None], turned)[0].repeat_interleave(heads // groups, 0)
        scores = rotate_halves(q[None], turned[at])[0] @ turned_keys.transpose(1, 2)
        hidden_keys = torch.arange(length, device=x.device) > at[:, None]
        p = (scores * layer.scale).masked_fill(hidden_keys, -torch.inf).softmax(-1)
        everything = torch.cat((k, v)).transpose(0, 1).flatten(1)  # [T, 2 G D]
        mixed = p.flatten(0, 1) @ everything
        mixed_sum += mixed.sum(0)
        mixed_square += mixed.T @ mixed
        # Evenly spaced quantiles with one random offset a query: unbiased, and far less noisy than free draws.
        offset = torch.rand(heads, at.numel(), 1, generator=generator).to(x.device)
        by_attention = (torch.arange(attended, device=x.device) + offset) / max(attended, 1)
        evenly = (torch.arange(keys - attended, device=x.device) + offset) / max(keys - attended, 1)
        token = torch.searchsorted(p.cumsum(-1), by_attention).minimum(at[:, None])
        token = torch.cat((token, (evenly * (at[:, None] + 1)).long()), dim=-1)
        drawn = v[group_of[:, None, None], token]
        drawn = drawn - drawn.mean(2, keepdim=True)
        weight = torch.einsum("hqkd,hde,hqke->hq", drawn, through, drawn) / (keys - 1)
        kept["k"].append(k.transpose(0, 1))
        kept["v"].append(v.transpose(0, 1))
        kept["token"].append(token + window * length)
        distance = (at[:, None] - token).float()
        if reach > length:
            far = torch.rand(heads, at.numel(), keys - attended, generator=generator).to(x.device)[..., ::2]
            distance[..., attended::2] = (far * reach).floor()
        kept["distance"].append(distance)
        kept["weight"].append(weight)
        seen = q.double()
        query += (seen * weight.double()[..., None]).transpose(1, 2) @ seen
        delivered = mixed.view(heads, -1, 2, groups, v.shape[2])[torch.arange(heads), :, 1, group_of]  # [H, Q, D]
        output += torch.einsum("mhd,hqd->qm", layer.w_o, delivered).square().sum(-1).mean().item()
    joined = {name: torch.cat(parts, dim=0 if name in ("k", "v") else 1) for name, parts in kept.items()}
    count = joined["weight"].numel()
    mean = mixed_sum / count
    return Pairs(
        **joined,
        attended=attended,
        query=(query / joined["weight"].double().sum(1)[:, None, None].clamp_min(1e-30)).float(),
        mixed=mixed_square / count - mean[:, None] * mean,
        output=output / x.shape[0],
    )
