"""What the two forms compute, in plain PyTorch: the reference that a compression is fitted to and measured against."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlacompile.convert.form import GQALayer, MLALayer


def rotation(inv_freq: Tensor, length: int) -> Tensor:
    """``[length, F, 2]``: cosine and sine of ``inv_freq · position`` for positions 0, 1, …; in ``inv_freq``'s dtype."""
    positions = torch.arange(length, device=inv_freq.device, dtype=torch.float64)
    angle = positions[:, None] * inv_freq.double()
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(inv_freq.dtype)


def halves_to_complex(x: Tensor) -> Tensor:
    """``[..., D]`` in rotate_half order (pairs i, i + D/2) as ``[..., D/2]`` complex."""
    re, im = x.chunk(2, dim=-1)
    return torch.complex(re, im)


def rotate_halves(x: Tensor, turned: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, H, T, D]`` in rotate_half order by ``turned [T, D/2, 2]``."""
    cos, sin = turned.unbind(-1)
    re, im = x.chunk(2, dim=-1)
    return torch.cat((re * cos - im * sin, im * cos + re * sin), dim=-1).to(x.dtype)


def rotate_pairs(x: Tensor, turned: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, H, T, P]`` whose pairs are neighbours (2i, 2i + 1), by ``turned [T, P/2, 2]``."""
    cos, sin = turned.unbind(-1)
    re, im = x[..., 0::2], x[..., 1::2]
    return torch.stack((re * cos - im * sin, im * cos + re * sin), dim=-1).flatten(-2).to(x.dtype)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [B, T, M]`` through ``weight [H, D, M]``: ``[B, H, T, D]``."""
    heads, width, _ = weight.shape
    out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, (heads, width)).transpose(1, 2)


def gqa_attention(layer: GQALayer, x: Tensor, turned: Tensor | None = None) -> Tensor:
    """Causal attention of ``x [B, T, M]``, positions from 0: ``[B, T, M]``. ``turned``: their ``rotation``."""
    turned = rotation(layer.inv_freq, x.shape[1]) if turned is None else turned
    q = rotate_halves(project(x, layer.w_q, layer.b_q), turned)
    k = rotate_halves(project(x, layer.w_k, layer.b_k), turned)
    v = project(x, layer.w_v, layer.b_v)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True)
    return F.linear(out.transpose(1, 2).flatten(-2), layer.w_o.flatten(1), layer.b_o)


def mla_heads(layer: MLALayer, x: Tensor, turned: Tensor | None = None) -> Tensor:
    """What the heads of ``layer`` deliver for ``x [B, T, M]``, before the output projection: ``[B, T, H V]``.

    Causal, positions from 0 (``turned``: their ``rotation``, if known), keys and values expanded from the latent.
    """
    turned = rotation(layer.inv_freq, x.shape[1]) if turned is None else turned
    nope = layer.w_uk.shape[1]
    q_nope, q_pe = project(x, layer.w_q, layer.b_q).split((nope, layer.w_q.shape[1] - nope), dim=-1)
    q = torch.cat((q_nope, rotate_pairs(q_pe, turned)), dim=-1)
    c_kv = F.linear(x, layer.w_dkv, layer.b_dkv)
    k_pe = rotate_pairs(F.linear(x, layer.w_kr, layer.b_kr)[:, None], turned)
    k_nope = project(c_kv, layer.w_uk, None)
    k = torch.cat((k_nope, k_pe.expand(-1, q.shape[1], -1, -1)), dim=-1)
    v = project(c_kv, layer.w_uv, None)
    # Equal widths, because the fused kernels of a CPU take no others and the fallback is several times slower.
    width = max(q.shape[-1], v.shape[-1])
    q, k, padded = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=layer.scale)[..., : v.shape[-1]]
    return out.transpose(1, 2).flatten(-2)


def mla_attention(layer: MLALayer, x: Tensor, turned: Tensor | None = None) -> Tensor:
    """Causal attention of ``x [B, T, M]``, positions from 0: ``[B, T, M]``. ``turned``: their ``rotation``."""
    return project_heads(layer, mla_heads(layer, x, turned))


def project_heads(layer: MLALayer, heads: Tensor) -> Tensor:
    """The output projection of what ``mla_heads`` delivers, ``[..., H V]``: ``[..., M]``."""
    return F.linear(heads, layer.w_o.flatten(1), layer.b_o)


_FIELDS = tuple(field.name for field in fields(MLALayer))


class GroupedAttention(nn.Module):
    """Stands where a Hugging Face attention module stood; no cache, positions from 0, so for measuring only.

    Turned for ``length`` positions once, longer inputs are turned as they come.
    """

    def __init__(self, layer: GQALayer, length: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.turned = rotation(layer.inv_freq, length)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return gqa_attention(self.layer, hidden_states, _first(self.turned, hidden_states.shape[1])), None


class LatentAttention(nn.Module):
    """The same for a latent layer. Its weights are parameters, by the names of MLALayer's fields."""

    def __init__(self, layer: MLALayer, length: int = 0) -> None:
        super().__init__()
        self.inv_freq, self.scale = layer.inv_freq, layer.scale
        self.turned = rotation(layer.inv_freq, length)
        for name, value in vars(layer).items():
            if name not in ("inv_freq", "scale"):
                self.register_parameter(name, None if value is None else nn.Parameter(value))

    @property
    def layer(self) -> MLALayer:
        return MLALayer(**{name: getattr(self, name) for name in _FIELDS})

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return mla_attention(self.layer, hidden_states, _first(self.turned, hidden_states.shape[1])), None


def _first(turned: Tensor, length: int) -> Tensor | None:
    return turned[:length] if len(turned) >= length else None
