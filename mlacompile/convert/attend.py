"""What the two forms compute, in plain PyTorch: the reference that a compression is fitted to and measured against."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlacompile.convert.form import GQALayer, MLALayer


def rotation(inv_freq: Tensor, length: int) -> Tensor:
    """``[length, F]`` complex64 (complex128 for float64): ``exp(i · inv_freq · position)`` for positions 0, 1, …"""
    positions = torch.arange(length, device=inv_freq.device, dtype=torch.float64)
    angle = positions[:, None] * inv_freq.double()
    turned = torch.polar(torch.ones_like(angle), angle)
    return turned if inv_freq.dtype == torch.float64 else turned.to(torch.complex64)


def halves_to_complex(x: Tensor) -> Tensor:
    """``[..., D]`` in rotate_half order (pairs i, i + D/2) as ``[..., D/2]`` complex."""
    re, im = x.chunk(2, dim=-1)
    return torch.complex(re, im)


def rotate_halves(x: Tensor, turned: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, H, T, D]`` in rotate_half order by ``turned [T, D/2]``."""
    cos, sin = turned.real.to(x.dtype), turned.imag.to(x.dtype)
    re, im = x.chunk(2, dim=-1)
    return torch.cat((re * cos - im * sin, im * cos + re * sin), dim=-1)


def rotate_pairs(x: Tensor, turned: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, H, T, P]`` whose pairs are neighbours (2i, 2i + 1), by ``turned [T, P/2]``."""
    cos, sin = turned.real.to(x.dtype), turned.imag.to(x.dtype)
    re, im = x[..., 0::2], x[..., 1::2]
    return torch.stack((re * cos - im * sin, im * cos + re * sin), dim=-1).flatten(-2)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [B, T, M]`` through ``weight [H, D, M]``: ``[B, H, T, D]``."""
    heads, width, _ = weight.shape
    out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, (heads, width)).transpose(1, 2)


def gqa_attention(layer: GQALayer, x: Tensor) -> Tensor:
    """Causal attention of ``x [B, T, M]``, positions from 0: ``[B, T, M]``."""
    turned = rotation(layer.inv_freq, x.shape[1])
    q = rotate_halves(project(x, layer.w_q, layer.b_q), turned)
    k = rotate_halves(project(x, layer.w_k, layer.b_k), turned)
    v = project(x, layer.w_v, layer.b_v)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True)
    return F.linear(out.transpose(1, 2).flatten(-2), layer.w_o.flatten(1), layer.b_o)


def mla_heads(layer: MLALayer, x: Tensor) -> Tensor:
    """What the heads of ``layer`` deliver for ``x [B, T, M]``, before the output projection: ``[B, T, H V]``.

    Causal, positions from 0, keys and values expanded from the latent.
    """
    turned = rotation(layer.inv_freq, x.shape[1])
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


def mla_attention(layer: MLALayer, x: Tensor) -> Tensor:
    """Causal attention of ``x [B, T, M]``, positions from 0: ``[B, T, M]``."""
    return project_heads(layer, mla_heads(layer, x))


def project_heads(layer: MLALayer, heads: Tensor) -> Tensor:
    """The output projection of what ``mla_heads`` delivers, ``[..., H V]``: ``[..., M]``."""
    return F.linear(heads, layer.w_o.flatten(1), layer.b_o)


class GroupedAttention(nn.Module):
    """Stands where a Hugging Face attention module stood; no cache, positions from 0, so for measuring only."""

    def __init__(self, layer: GQALayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return gqa_attention(self.layer, hidden_states), None


class LatentAttention(nn.Module):
    """The same for a latent layer. Its weights are parameters, by the names of MLALayer's fields."""

    def __init__(self, layer: MLALayer) -> None:
        super().__init__()
        self.inv_freq, self.scale = layer.inv_freq, layer.scale
        for field in fields(layer):
            value = getattr(layer, field.name)
            if field.name not in ("inv_freq", "scale"):
                self.register_parameter(field.name, None if value is None else nn.Parameter(value))

    @property
    def layer(self) -> MLALayer:
        return MLALayer(**{field.name: getattr(self, field.name) for field in fields(MLALayer)})

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return mla_attention(self.layer, hidden_states), None
