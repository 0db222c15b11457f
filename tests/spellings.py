"""Latent attention written in many ways: one module whose independent choices compose, for tests of the recogniser.

None of the choices changes what is computed beyond a permutation of weights; the compiler has to see through all of
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spelling:
    """One way to write latent attention.

    attention: how scores, softmax and values are spelled. projection: how w_uk and w_uv are stored.
    order: which part of a key comes first. rope: how the rotary part is turned. cache: what is stored between steps.
    """

    attention: str = "sdpa"  # sdpa, matmul, einsum, bshd, two_terms
    projection: str = "joint"  # joint, separate, slices, blocks
    order: str = "nope_rope"  # nope_rope, rope_nope
    rope: str = "half"  # half, interleaved, complex, none
    cache: str = "none"  # none, apart, fused
    mask: str = "bool"  # none, bool, additive, causal
    norm: str = "before"  # before, after (the cache), off
    key_scale: float = 1.0
    v_bias: bool = False
    k_bias: bool = False
    heads: int = 4
    rank: int = 24
    nope: int = 12
    rope_width: int = 8
    v: int = 10
    hidden: int = 40

    @property
    def pe(self) -> int:
        """Rotary values a token."""
        return 0 if self.rope == "none" else self.rope_width


def turn(x: Tensor, positions: Tensor, kind: str) -> Tensor:
    """Rotary embedding of ``[..., S, P]`` at integer positions ``[S]``."""
    width = x.shape[-1]
    angle = positions[:, None].to(torch.float32) / 100 ** (torch.arange(0, width, 2, device=x.device) / width)
    angle = angle.to(x.dtype)
    if kind == "complex":
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous()) * torch.polar(
            torch.ones_like(angle, dtype=torch.float32), angle.float()
        )
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    if kind == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).flatten(-2)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    """One attention layer of a given spelling: ``forward(x [B, S, hidden], position, mask)``.

    With a cache, ``position`` is where the first of the S tokens is written, and all ``context`` rows are attended to
    under ``mask [B, 1, S, T]``.
    """

    def __init__(self, spelling: Spelling, batch: int = 2, context: int = 16) -> None:
        super().__init__()
        self.s = s = spelling
        h, qk = s.heads, s.nope + s.pe
        self.q_proj = nn.Linear(s.hidden, h * qk, bias=False)
        self.down = nn.Linear(s.hidden, s.rank + s.pe, bias=False)
        self.norm = nn.RMSNorm(s.rank)
        if s.projection == "joint":
            self.up = nn.Linear(s.rank, h * (s.nope + s.v), bias=s.v_bias or s.k_bias)
        elif s.projection == "blocks":
            self.up = nn.Linear(s.rank, h * s.nope + h * s.v, bias=s.v_bias or s.k_bias)
        elif s.projection == "separate":
            self.up_k = nn.Linear(s.rank, h * s.nope, bias=s.k_bias)
            self.up_v = nn.Linear(s.rank, h * s.v, bias=s.v_bias)
        else:
            self.w = nn.Parameter(torch.randn(h, s.nope + s.v, s.rank) / math.sqrt(s.rank))
        self.out = nn.Linear(h * s.v, s.hidden, bias=False)
        if s.cache == "apart":
            self.register_buffer("cache_c", torch.zeros(batch, context, s.rank), persistent=False)
            self.register_buffer("cache_pe", torch.zeros(batch, context, s.pe), persistent=False)
        elif s.cache == "fused":
            self.register_buffer("cache", torch.zeros(batch, context, s.rank + s.pe), persistent=False)

    def latents(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """c_kv ``[B, T, R]`` and k_pe ``[B, T, P]`` of all tokens to attend to."""
        s = self.s
        b, n, _ = x.shape
        c, pe = self.down(x).split([s.rank, s.pe], -1)
        if s.norm == "before":
            c = self.norm(c)
        if s.pe:
            pe = turn(pe, torch.arange(n, device=x.device) + position, s.rope)
        if s.cache == "apart":
            self.cache_c[:b, position : position + n] = c
            self.cache_pe[:b, position : position + n] = pe
            c, pe = self.cache_c[:b], self.cache_pe[:b]
        elif s.cache == "fused":
            self.cache[:b, position : position + n] = torch.cat((c, pe), -1)
            c, pe = self.cache[:b, :, : s.rank], self.cache[:b, :, s.rank :]
        return (self.norm(c) if s.norm == "after" else c), pe

    def expand(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """k_nope and v as ``[B, T, H, ·]``."""
        s = self.s
        b, t, _ = c.shape
        if s.projection == "joint":
            kv = self.up(c).view(b, t, s.heads, s.nope + s.v)
            return kv[..., : s.nope], kv[..., s.nope :]
        if s.projection == "blocks":
            k, v = self.up(c).split([s.heads * s.nope, s.heads * s.v], -1)
            return k.reshape(b, t, s.heads, s.nope), v.reshape(b, t, s.heads, s.v)
        if s.projection == "separate":
            return self.up_k(c).view(b, t, s.heads, s.nope), self.up_v(c).view(b, t, s.heads, s.v)
        k = torch.einsum("btr,hnr->bthn", c, self.w[:, : s.nope])
        return k, torch.einsum("btr,hvr->bthv", c, self.w[:, s.nope :])

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        s = self.s
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, s.heads, s.nope + s.pe)
        q_nope, q_pe = q.split([s.nope, s.pe], -1)
        if s.pe:
            q_pe = turn(q_pe.transpose(1, 2), torch.arange(n, device=x.device) + position, s.rope).transpose(1, 2)
        c, pe = self.latents(x, position)
        k_nope, v = self.expand(c)
        k_nope = k_nope * s.key_scale
        pe = pe[:, :, None].expand(-1, -1, s.heads, -1)
        parts = ((q_nope, q_pe), (k_nope, pe)) if s.order == "nope_rope" else ((q_pe, q_nope), (pe, k_nope))
        if s.attention == "two_terms":
            out = self.two_terms(q_nope, q_pe, k_nope, pe, v, mask)
        else:
            out = self.attend(torch.cat(parts[0], -1), torch.cat(parts[1], -1), v, mask)
        return self.out(out.reshape(b, n, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over ``[B, ·, H, ·]`` operands; ``[B, S, H, V]`` out."""
        s = self.s
        scale = 1 / math.sqrt(s.nope + s.pe)
        if s.attention == "sdpa":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            causal = s.mask == "causal"
            out = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
            return out.transpose(1, 2)
        if s.attention == "matmul":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            p = self.weights(q @ k.transpose(2, 3) * scale, mask)
            return (p @ v).transpose(1, 2)
        if s.attention == "einsum":
            p = self.weights(torch.einsum("bshd,bthd->bhst", q * scale, k), mask)
            return torch.einsum("bhst,bthv->bshv", p, v)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * scale
        p = self.weights(scores, None if mask is None else mask.transpose(1, 2))
        return torch.einsum("bsht,bthv->bshv", p, v)

    def two_terms(
        self, q_nope: Tensor, q_pe: Tensor, k_nope: Tensor, pe: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Scores as a sum of a content and a position term."""
        scale = 1 / math.sqrt(self.s.nope + self.s.pe)
        scores = torch.einsum("bshd,bthd->bhst", q_nope, k_nope)
        if self.s.pe:
            scores = scores + torch.einsum("bshd,bthd->bhst", q_pe, pe)
        return torch.einsum("bhst,bthv->bshv", self.weights(scores * scale, mask), v)

    @staticmethod
    def weights(scores: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax in float32, under a mask."""
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
