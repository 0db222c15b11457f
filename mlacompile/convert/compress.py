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

from mlacompile.convert.attend import halves_to_complex, rotation
from mlacompile.convert.calibrate import Pairs
from mlacompile.convert.form import GQALayer, MLALayer
from mlacompile.convert.rotate import Lanes
from mlacompile.errors import UnsupportedInputError

_RIDGE = 1e-4  # of the mean diagonal: the sample is finite


#: Rows of a chunk of pairs, so that what is made of them stays in a core's cache; columns of a product at once.
_CHUNK, _STRIP = 1024, 128


class _Sample:
    """A layer's pairs with what all heads share: tokens y = [k; v], their lanes, and how keys turn by distance."""

    def __init__(self, layer: GQALayer, pairs: Pairs, lanes: Lanes) -> None:
        farthest = int(pairs.distance.max())
        self.pairs, self.per_group = pairs, layer.w_q.shape[0] // layer.w_k.shape[0]
        self.key_turns, self.lane_turns = _turns(layer.inv_freq, farthest), _turns(lanes.inv_freq, farthest)
        self.keys = halves_to_complex(pairs.k)  # [tokens, G, D/2]
        self.lanes = self.keys.flatten(1) @ lanes.mix.to(torch.complex64).T  # [tokens, P/2]
        self.tokens = torch.cat((pairs.k.flatten(1), pairs.v.flatten(1)), dim=1)  # [tokens, 2 G D]

    def moments(self, head: int) -> list[list[Tensor]]:
        """Second moments within queries of one head's rotated keys κ, lanes z and tokens y: ``[3][3]`` blocks."""
        keys = self.keys[:, head // self.per_group].contiguous()
        widths = [2 * keys.shape[1], 2 * self.lanes.shape[1], self.tokens.shape[1]]
        size = sum(widths)
        moment = torch.zeros(size, size, dtype=torch.float64, device=keys.device)
        token, distance, weight = self.pairs.token[head], self.pairs.distance[head].long(), self.pairs.weight[head]
        root = (weight * (1 / (token.shape[1] - 1))).sqrt()
        for at in torch.arange(token.shape[0], device=keys.device).split(max(1, _CHUNK // token.shape[1])):
            turned = keys[token[at]] * self.key_turns[distance[at]]
            lane = self.lanes[token[at]] * self.lane_turns[distance[at]]
            parts = (turned.real, turned.imag, torch.view_as_real(lane).flatten(-2), self.tokens[token[at]])
            stacked = torch.cat(parts, dim=-1)
            scaled = ((stacked - stacked.mean(1, keepdim=True)) * root[at, None, None]).flatten(0, 1)
            for strip in range(0, size, _STRIP):  # the upper triangle of strips is enough
                moment[strip : strip + _STRIP, strip:] += scaled[:, strip : strip + _STRIP].T @ scaled[:, strip:]
        moment = (moment.triu() + moment.triu(1).T) / token.shape[0]
        return [list(row.split(widths, dim=1)) for row in moment.split(widths, dim=0)]


def _turns(inv_freq: Tensor, farthest: int) -> Tensor:
    """``[farthest + 1, F]`` complex: what a key that is so far away is multiplied by. Few distances, many pairs."""
    return torch.view_as_complex(rotation(inv_freq, farthest + 1)).conj().resolve_conj()


def regress(targets: Tensor, features: Tensor, ridge: float = _RIDGE) -> Tensor:
    """``A [t, f]`` of ``target ≈ A feature``, from E[target featureᵀ] ``[t, f]`` and E[feature featureᵀ] ``[f, f]``."""
    damping = ridge * features.diagonal().mean().clamp_min(1e-30)
    damped = features + damping * torch.eye(features.shape[0], dtype=features.dtype, device=features.device)
    return torch.linalg.solve(damped, targets.T).T


class Compression:
    """A layer with its lanes and its pairs; ``to_rank`` cuts it, as often as one likes.

    Raises UnsupportedInputError for a layer whose rank would not be in 1 … 2 G D.
    """

    def __init__(self, layer: GQALayer, pairs: Pairs, lanes: Lanes) -> None:
        self.layer, self.pairs, self.lanes = layer, pairs, lanes
        heads = layer.w_q.shape[0]
        sample = _Sample(layer, pairs, lanes)
        self._moments = [sample.moments(head) for head in range(heads)]
        token = torch.stack([m[2][2] for m in self._moments]).mean(0)
        self._score_worth = torch.zeros_like(token)
        for head, m in enumerate(self._moments):
            # y without what the lanes say of it, and what that says of the rest of κ.
            lane_of_key, lane_of_token = regress(m[0][1], m[1][1]), regress(m[2][1], m[1][1])
            rest = m[0][2] - lane_of_key @ m[1][2]
            rest_token = m[2][2] - lane_of_token @ m[1][2]
            read = regress(rest, rest_token)
            self._score_worth += layer.scale**2 * read.T @ pairs.query[head].double() @ read
        values, vectors = torch.linalg.eigh(token)
        values = values.clamp_min(values[-1] * 1e-9)
        self._root = (vectors * values.sqrt()) @ vectors.T
        self._inverse = (vectors / values.sqrt()) @ vectors.T

    def to_rank(self, rank: int, *, balance: float = 1.0, bias: bool = True) -> MLALayer:
        """On ``rank`` latent values and ``2 · lanes`` rotary ones a token.

        ``balance`` multiplies the worth of scores against values; 1 is what the bound in calibrate.py says. Without
        ``bias`` the mean of the values has to come from the latent.
        """
        layer, pairs, lanes = self.layer, self.pairs, self.lanes
        heads, width, _ = layer.w_q.shape
        groups = layer.w_k.shape[0]
        per_group, size = heads // groups, 2 * groups * width
        if not 1 <= rank <= size:
            raise UnsupportedInputError(
                f"got rank {rank}; expected 1 to {size}, the width of the layer's keys and values"
            )
        mean = torch.cat((pairs.k.mean(0).flatten(), pairs.v.mean(0).flatten())).double()
        mixed = pairs.mixed.double() if bias else pairs.mixed.double() + mean[:, None] * mean
        worth = balance * self._score_worth
        worth[size // 2 :, size // 2 :] += _value_worth(layer)
        order = torch.linalg.eigh(self._root @ worth @ self._root).eigenvectors.flip(-1)
        down = order[:, :rank].T @ self._inverse  # [R, 2 G D]

        first = size // 2
        seen = mixed @ down.T  # [2 G D, R]
        read_v = regress(seen[first:], down @ seen).view(groups, width, rank)
        w_uk, rope = [], []
        for m in self._moments:
            onto = torch.cat((m[0][2] @ down.T, m[0][1]), dim=1)
            crossed = down @ m[2][1]
            features = torch.cat((torch.cat((down @ m[2][2] @ down.T, crossed), 1), torch.cat((crossed.T, m[1][1]), 1)))
            read = regress(onto, features)
            w_uk.append(read[:, :rank])
            rope.append(read[:, rank:].T)
        group_of = torch.arange(heads, device=mean.device) // per_group
        q_rope, up_v = torch.stack(rope), read_v[group_of]  # [H, P, D], [H, D, R]

        # The mean of a head's values that the latent's own mean does not bring.
        lost = mean[first:].view(groups, width)[group_of] - torch.einsum("hdr,r->hd", up_v, down @ mean)
        b_o = torch.einsum("mhd,hd->m", layer.w_o.double(), lost) if bias else None
        if layer.b_o is not None:
            b_o = layer.b_o.double() if b_o is None else b_o + layer.b_o

        stored = torch.cat((layer.w_k.flatten(0, 1), layer.w_v.flatten(0, 1))).double()
        w_q, w_k = layer.w_q.double(), layer.w_k.double()
        b_q = None if layer.b_q is None else layer.b_q.double()
        b_k, b_v = (None if b is None else b.double().flatten() for b in (layer.b_k, layer.b_v))
        b_dkv = None
        if b_k is not None or b_v is not None:
            zero = mean.new_zeros(size // 2)
            b_dkv = down @ torch.cat((zero if b_k is None else b_k, zero if b_v is None else b_v))
        return MLALayer(
            w_q=torch.cat((w_q, torch.einsum("hpd,hdm->hpm", q_rope, w_q)), dim=1).float(),
            w_dkv=(down @ stored).float(),
            w_kr=lanes.of(w_k.movedim(-1, 0)).T.float().contiguous(),
            w_uk=torch.stack(w_uk).float(),
            w_uv=up_v.float(),
            w_o=layer.w_o.float(),
            b_q=None if b_q is None else torch.cat((b_q, torch.einsum("hpd,hd->hp", q_rope, b_q)), dim=1).float(),
            b_dkv=None if b_dkv is None else b_dkv.float(),
            b_kr=None if b_k is None else lanes.of(b_k.view(1, groups, width))[0].float(),
            b_o=None if b_o is None else b_o.float(),
            inv_freq=lanes.inv_freq,
            scale=layer.scale,
        )


def _value_worth(layer: GQALayer) -> Tensor:
    """W_Oᵀ W_O of the heads that read each group of values, ``[G D, G D]``."""
    groups, width = layer.w_v.shape[:2]
    per_group = layer.w_q.shape[0] // groups
    worth = torch.zeros(groups, width, groups, width, dtype=torch.float64, device=layer.w_v.device)
    for head in range(layer.w_q.shape[0]):
        w_o = layer.w_o[:, head].double()
        worth[head // per_group, :, head // per_group] += w_o.T @ w_o
    return worth.view(groups * width, groups * width)
