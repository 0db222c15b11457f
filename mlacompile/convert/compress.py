"""A layer with given rotary lanes becomes latent attention of a given rank, by three regressions on sampled pairs.

1. What the lanes already say of a head's keys (as its queries see them, rotated to their distance) is taken out.
2. One eigenproblem picks the latent: the combinations of keys and values that matter most to the rest of the scores
   (weighed by the queries) and to the output (weighed by W_O), both in units of the squared output.
3. Every head then reads scores from latent and lanes together by least squares, and values from the latent.

The means of keys and values cost no latent value: one shifts all scores alike, the other is a bias of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.convert.attend import halves_to_complex
from mlacompile.convert.calibrate import Pairs
from mlacompile.convert.form import GQALayer, MLALayer
from mlacompile.convert.rotate import Lanes
from mlacompile.errors import UnsupportedInputError

_RIDGE = 1e-4  # of the mean diagonal: the sample is finite


class _Moments:
    """Second moments within queries of one head's rotated keys κ, lanes z and tokens y = [k; v]."""

    def __init__(self, layer: GQALayer, pairs: Pairs, lanes: Lanes, head: int) -> None:
        groups = layer.w_k.shape[0]
        group = head // (layer.w_q.shape[0] // groups)
        token, distance = pairs.token[head], pairs.distance[head][..., None]
        k, v = pairs.k[token], pairs.v[token]  # [Q, K, G, D]
        mixed = halves_to_complex(k).flatten(-2) @ lanes.mix.to(torch.complex64).T
        turned = halves_to_complex(k[..., group, :]) * _turn(layer.inv_freq, distance)
        lane = mixed * _turn(lanes.inv_freq, distance)
        parts = (
            torch.cat((turned.real, turned.imag), dim=-1),
            torch.view_as_real(lane).flatten(-2),
            torch.cat((k.flatten(-2), v.flatten(-2)), dim=-1),
        )
        self.widths = [part.shape[-1] for part in parts]
        stacked = torch.cat(parts, dim=-1)
        centred = stacked - stacked.mean(1, keepdim=True)
        keys = token.shape[1]
        scaled = (centred * (pairs.weight[head] * (1 / (keys - 1)))[:, None, None].sqrt()).flatten(0, 1)
        self.moment = (scaled.T @ scaled).double() / token.shape[0]

    def split(self) -> list[list[Tensor]]:
        return [list(row.split(self.widths, dim=1)) for row in self.moment.split(self.widths, dim=0)]


def _turn(inv_freq: Tensor, distance: Tensor) -> Tensor:
    angle = -distance * inv_freq
    return torch.polar(torch.ones_like(angle), angle)


def regress(targets: Tensor, features: Tensor, ridge: float = _RIDGE) -> Tensor:
    """``A [t, f]`` of ``target ≈ A feature``, from E[target featureᵀ] ``[t, f]`` and E[feature featureᵀ] ``[f, f]``."""
    damping = ridge * features.diagonal().mean().clamp_min(1e-30)
    damped = features + damping * torch.eye(features.shape[0], dtype=features.dtype, device=features.device)
    return torch.linalg.solve(damped, targets.T).T


def compress(layer: GQALayer, pairs: Pairs, lanes: Lanes, *, rank: int, balance: float = 1.0) -> MLALayer:
    """``layer`` on ``rank`` latent values and ``2 · lanes`` rotary ones a token.

    ``balance`` multiplies the worth of scores against values; 1 is what the bound in calibrate.py says.

    Raises UnsupportedInputError for biases on queries, keys or values, and for a rank that is not in 1 … 2 G D.
    """
    if any(bias is not None for bias in (layer.b_q, layer.b_k, layer.b_v)):
        raise UnsupportedInputError("got a layer with biases on queries, keys or values; compression expects none yet")
    if not 1 <= rank <= 2 * layer.w_k.shape[0] * layer.w_k.shape[1]:
        most = 2 * layer.w_k.shape[0] * layer.w_k.shape[1]
        raise UnsupportedInputError(f"got rank {rank}; expected 1 to {most}, the width of the layer's keys and values")
    heads, width, _ = layer.w_q.shape
    groups = layer.w_k.shape[0]
    per_group = heads // groups
    moments = [_Moments(layer, pairs, lanes, head).split() for head in range(heads)]
    size = 2 * groups * width
    token = torch.stack([m[2][2] for m in moments]).mean(0)
    worth = torch.zeros_like(token)
    for head, m in enumerate(moments):
        # y without what the lanes say of it, and what that says of the rest of κ.
        lane_of_key, lane_of_token = regress(m[0][1], m[1][1]), regress(m[2][1], m[1][1])
        rest = m[0][2] - lane_of_key @ m[1][2]
        rest_token = m[2][2] - lane_of_token @ m[1][2]
        read = regress(rest, rest_token)
        worth += balance * layer.scale**2 * read.T @ pairs.query[head].double() @ read
    output, mixing = _value_moments(layer, pairs)
    worth[size // 2 :, size // 2 :] += output
    values, vectors = torch.linalg.eigh(token)
    root = (vectors * values.clamp_min(values[-1] * 1e-9).sqrt()) @ vectors.T
    inverse = (vectors / values.clamp_min(values[-1] * 1e-9).sqrt()) @ vectors.T
    down = torch.linalg.eigh(root @ worth @ root).eigenvectors.flip(-1)[:, :rank].T @ inverse  # [R, 2 G D]

    stored = torch.cat((layer.w_k.flatten(0, 1), layer.w_v.flatten(0, 1))).double()
    w_uk, q_rope, w_uv = [], [], []
    mean = torch.cat((pairs.k.double().mean(0).flatten(), pairs.v.double().mean(0).flatten()))
    for head, m in enumerate(moments):
        onto = torch.cat((m[0][2] @ down.T, m[0][1]), dim=1)
        crossed = down @ m[2][1]
        features = torch.cat((torch.cat((down @ m[2][2] @ down.T, crossed), 1), torch.cat((crossed.T, m[1][1]), 1)))
        read = regress(onto, features)
        w_uk.append(read[:, :rank])
        q_rope.append(read[:, rank:].T)
        group = head // per_group
        value = mixing[size // 2 + group * width : size // 2 + (group + 1) * width]
        w_uv.append(regress(value @ down.T, down @ mixing @ down.T))
    up_v = torch.stack(w_uv)
    group_of = torch.arange(heads, device=mean.device) // per_group
    lost = mean[size // 2 :].view(groups, width)[group_of] - torch.einsum("hdr,r->hd", up_v, down @ mean)
    bias = torch.einsum("mhd,hd->m", layer.w_o.double(), lost)
    rope = torch.stack(q_rope)  # [H, P, D]
    k_lanes = halves_to_complex(layer.w_k.movedim(-1, 0).double()).flatten(1)  # [M, G · D/2]
    w_kr = torch.view_as_real(k_lanes @ lanes.mix.T).flatten(1).T
    return MLALayer(
        w_q=torch.cat((layer.w_q.double(), torch.einsum("hpd,hdm->hpm", rope, layer.w_q.double())), dim=1).float(),
        w_dkv=(down @ stored).float(),
        w_kr=w_kr.float(),
        w_uk=torch.stack(w_uk).float(),
        w_uv=up_v.float(),
        w_o=layer.w_o.float(),
        b_q=None,
        b_dkv=None,
        b_kr=None,
        b_o=(bias if layer.b_o is None else bias + layer.b_o).float(),
        inv_freq=lanes.inv_freq,
        scale=layer.scale,
    )


def _value_moments(layer: GQALayer, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The worth of values ``[G D, G D]`` (W_Oᵀ W_O of their heads), and the mixed tokens' moment ``[2 G D, 2 G D]``."""
    groups, width = layer.w_v.shape[:2]
    per_group = layer.w_q.shape[0] // groups
    worth = torch.zeros(groups, width, groups, width, dtype=torch.float64, device=layer.w_v.device)
    size = 2 * groups * width
    moment = torch.zeros(size, size, dtype=torch.float64, device=layer.w_v.device)
    for head in range(layer.w_q.shape[0]):
        group = head // per_group
        w_o = layer.w_o[:, head].double()
        worth[group, :, group] += w_o.T @ w_o
        y = torch.cat((pairs.k.flatten(1), pairs.v.flatten(1)), dim=1)
        mixed = y[pairs.token[head][:, : pairs.attended]].mean(1)
        mixed = mixed - mixed.mean(0)
        moment += (mixed.T @ mixed).double() / mixed.shape[0]
    return worth.view(groups * width, groups * width), moment / layer.w_q.shape[0]
