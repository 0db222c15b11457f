"""The baseline: TransMLA (arXiv 2502.07864), from second moments of layer inputs alone.

Heads are rotated into each other, frequency by frequency, so that the first component of every rotary pair holds most
of the keys' energy and alone keeps its rotary embedding (RoRoPE). Neighbouring frequencies may be taken for equal and
rotated together (FreqFold). What is left of the keys stands beside the values, balanced in size, and one PCA cuts both.

As in its published code (fxmeng/TransMLA, partial_rope.py and lora_qkv.py) there are two calibrations: the rotations
are made from the original's activations, the PCA from those of the model whose keys are rotated so in every layer
already and nothing of which is truncated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.convert.form import GQALayer, MLALayer
from mlacompile.errors import UnsupportedInputError

_DAMPING = 0.01  # of the mean diagonal, as the paper's code has it


def transmla(
    layer: GQALayer,
    moment: Tensor,
    *,
    rope_dim: int,
    rank: int,
    fold: int = 1,
    balance: bool = True,
    partial: Tensor | None = None,
) -> MLALayer:
    """``layer`` cut to ``rope_dim`` rotary and ``rank`` latent values a token.

    ``moment [M, M]`` is E[x xᵀ] of the layer input in the original, ``partial`` the same in the model with as few
    rotary values and all of its latent, if it is at hand. Of every ``fold`` neighbouring frequencies as many rotary
    components are kept as ``rope_dim`` allows, at evenly spaced ones of their frequencies. Works in float64; float32
    comes out.

    Raises UnsupportedInputError for biases on keys or values, and for widths that do not divide.
    """
    groups, width, _ = layer.w_k.shape
    pairs, kept_pairs = width // 2, rope_dim // 2
    if layer.b_k is not None or layer.b_v is not None:
        raise UnsupportedInputError("got a layer with biases on keys or values; the TransMLA baseline expects none")
    if pairs % fold or kept_pairs * fold % pairs:
        raise UnsupportedInputError(
            f"got rope_dim {rope_dim} and fold {fold} for heads of {width}; "
            f"expected fold to divide {pairs}, and a whole number of the components of every fold to be kept"
        )
    kept = kept_pairs * fold // pairs
    w_q, w_k, w_v, moment = (t.double() for t in (layer.w_q, layer.w_k, layer.w_v, moment.to(layer.w_q.device)))
    partial = moment if partial is None else partial.to(moment)
    heads = w_q.shape[0]
    group_of = torch.arange(heads, device=w_q.device) // (heads // groups)

    # [buckets, G · fold, 2, M]: in a bucket every (head, frequency) is one complex lane.
    lanes = w_k.view(groups, 2, pairs // fold, fold, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)
    energy = torch.einsum("bmcx,xy,bncy->bmn", lanes, moment, lanes)
    diagonal = energy.diagonal(dim1=-2, dim2=-1)
    energy = energy + torch.diag_embed(_DAMPING * diagonal.mean(-1, keepdim=True).expand_as(diagonal))
    turn = torch.linalg.eigh(energy).eigenvectors.flip(-1)  # [buckets, G · fold, components], greatest first
    turned = torch.einsum("bmn,bmcx->bncx", turn, lanes)

    w_kr = turned[:, :kept].flatten(0, 2)
    w_k_nope = turned[:, kept:].flatten(0, 2)
    # How head h reads component n of a bucket: through the column of its own group, at each of the folded frequencies.
    read = turn.view(pairs // fold, groups, fold, -1)[:, group_of]  # [buckets, H, fold, components]
    queries = w_q.view(heads, 2, pairs // fold, fold, -1)
    q_rope = torch.einsum("bhfn,hcbfx->hbncx", read[..., :kept], queries).flatten(1, 3)
    # [H, D, components without rotary embedding]
    k_up = torch.zeros(
        heads, 2, pairs // fold, fold, pairs // fold, turn.shape[-1] - kept, 2, dtype=w_q.dtype, device=w_q.device
    )
    for part in range(2):
        for bucket in range(pairs // fold):
            k_up[:, part, bucket, :, bucket, :, part] = read[bucket, :, :, kept:]
    k_up = k_up.view(heads, width, -1)

    norm_k = torch.einsum("ax,xy,ay->a", w_k_nope, partial, w_k_nope).sqrt()
    # Without as many of the values as keys are rotary: so does the published code.
    kept_v = w_v.flatten(0, 1)[rope_dim:]
    norm_v = torch.einsum("ax,xy,ay->a", kept_v, partial, kept_v).sqrt()
    ratio = (norm_k.mean() / norm_v.mean()).item() if balance and norm_k.numel() and norm_v.numel() else 1.0
    joint = torch.cat((w_k_nope / ratio, w_v.flatten(0, 1)))
    basis = torch.linalg.eigh(joint @ partial @ joint.T).eigenvectors.flip(-1)[:, :rank]
    up_k, up_v = basis[: w_k_nope.shape[0]] * ratio, basis[w_k_nope.shape[0] :].view(groups, width, rank)

    spaced = torch.arange(kept) * (fold // kept) if kept <= fold else torch.arange(kept) % fold
    inv_freq = layer.inv_freq.view(pairs // fold, fold)[:, spaced].flatten()
    return MLALayer(
        w_q=torch.cat((w_q, q_rope), dim=1).float(),
        w_dkv=(basis.T @ joint).float(),
        w_kr=w_kr.float(),
        w_uk=torch.einsum("hda,ar->hdr", k_up, up_k).float(),
        w_uv=up_v[group_of].float(),
        w_o=layer.w_o.float(),
        b_q=None
        if layer.b_q is None
        else torch.cat((layer.b_q.double(), torch.zeros_like(q_rope[..., 0])), dim=1).float(),
        b_dkv=None,
        b_kr=None,
        b_o=layer.b_o,
        inv_freq=inv_freq,
        scale=layer.scale,
    )
