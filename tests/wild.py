"""Latent attention as published code writes it: one small module for each style, with its cache, rope and layout.

``tests/spellings.py`` composes choices; the modules here keep together what is found together. Every module is called
as ``forward(x [B, S, hidden], position, mask)`` and returns ``[B, S, hidden]``; sizes are tiny.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, HIDDEN, R, N, P, V, ROWS = 4, 32, 20, 12, 8, 10, 24


def angles(positions: Tensor) -> Tensor:
    """Unit complex numbers ``[S, P/2]``."""
    turns = positions[:, None].float() / 100 ** (torch.arange(0, P, 2) / P)
    return torch.polar(torch.ones_like(turns), turns)


def rope_complex(x: Tensor, freqs: Tensor) -> Tensor:
    """Adjacent values as complex numbers; ``x [B, S, H, P]``."""
    z = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * freqs.view(1, z.size(1), 1, z.size(-1))).flatten(3).to(x.dtype)


def rope_half(x: Tensor, positions: Tensor) -> Tensor:
    """First half with second half; ``x [..., S, P]``."""
    z = angles(positions)
    cos, sin = torch.cat((z.real, z.real), -1), torch.cat((z.imag, z.imag), -1)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class HeldCaches(nn.Module):
    """Caches as buffers of the module, written by slice assignment at an int position, read up to the newest token.

    absorb: scores on the latent by einsums over a view of the up-projection, and a cache of latents; else keys and
    values of every head are cached. Complex rope, queries through a latent of their own.
    """

    def __init__(self, absorb: bool, batch: int = 2) -> None:
        super().__init__()
        self.absorb = absorb
        self.wq_a, self.q_norm, self.wq_b = (
            nn.Linear(HIDDEN, 16, bias=False),
            nn.RMSNorm(16),
            nn.Linear(16, H * (N + P), bias=False),
        )
        self.wkv_a, self.kv_norm = nn.Linear(HIDDEN, R + P), nn.RMSNorm(R)
        self.wkv_b = nn.Linear(R, H * (N + V), bias=False)
        self.wo = nn.Linear(H * V, HIDDEN)
        self.scale = (N + P) ** -0.5 * (0.1 * math.log(40) + 1.0) ** 2
        if absorb:
            self.register_buffer("kv_cache", torch.zeros(batch, ROWS, R), persistent=False)
            self.register_buffer("pe_cache", torch.zeros(batch, ROWS, P), persistent=False)
        else:
            self.register_buffer("k_cache", torch.zeros(batch, ROWS, H, N + P), persistent=False)
            self.register_buffer("v_cache", torch.zeros(batch, ROWS, H, V), persistent=False)

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.size()
        end = position + s
        freqs = angles(torch.arange(position, end))
        q = self.wq_b(self.q_norm(self.wq_a(x))).view(b, s, H, N + P)
        q_nope, q_pe = torch.split(q, [N, P], dim=-1)
        q_pe = rope_complex(q_pe, freqs)
        kv, k_pe = torch.split(self.wkv_a(x), [R, P], dim=-1)
        k_pe = rope_complex(k_pe.unsqueeze(2), freqs)
        if not self.absorb:
            q = torch.cat([q_nope, q_pe], dim=-1)
            kv = self.wkv_b(self.kv_norm(kv)).view(b, s, H, N + V)
            k_nope, v = torch.split(kv, [N, V], dim=-1)
            k = torch.cat([k_nope, k_pe.expand(-1, -1, H, -1)], dim=-1)
            self.k_cache[:b, position:end] = k
            self.v_cache[:b, position:end] = v
            scores = torch.einsum("bshd,bthd->bsht", q, self.k_cache[:b, :end]) * self.scale
        else:
            wkv_b = self.wkv_b.weight.view(H, -1, R)
            q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, :N])
            self.kv_cache[:b, position:end] = self.kv_norm(kv)
            self.pe_cache[:b, position:end] = k_pe.squeeze(2)
            scores = (
                torch.einsum("bshc,btc->bsht", q_nope, self.kv_cache[:b, :end])
                + torch.einsum("bshr,btr->bsht", q_pe, self.pe_cache[:b, :end])
            ) * self.scale
        if mask is not None:
            scores += mask.unsqueeze(1)
        scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        if not self.absorb:
            out = torch.einsum("bsht,bthd->bshd", scores, self.v_cache[:b, :end])
        else:
            out = torch.einsum("bsht,btc->bshc", scores, self.kv_cache[:b, :end])
            out = torch.einsum("bshc,hdc->bshd", out, wkv_b[:, -V:])
        return self.wo(out.flatten(2))


class Trainer(nn.Module):
    """A training framework's layer: no cache, SDPA, complex rope on the shared key before it is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(HIDDEN, H * (N + P), bias=False)
        self.wkv_a, self.kv_norm = nn.Linear(HIDDEN, R + P, bias=False), nn.RMSNorm(R)
        self.wkv_b, self.wo = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN, bias=False)

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.size()
        freqs = angles(torch.arange(s))
        q = self.wq(x).view(b, s, -1, N + P)
        q_nope, q_pe = torch.split(q, [N, P], dim=-1)
        q = torch.cat([q_nope, rope_complex(q_pe, freqs)], dim=-1)
        kv, k_pe = torch.split(self.wkv_a(x), [R, P], dim=-1)
        k_pe = rope_complex(k_pe.unsqueeze(2), freqs)
        kv = self.wkv_b(self.kv_norm(kv)).view(b, s, -1, N + V)
        k_nope, v = torch.split(kv, [N, V], dim=-1)
        k = torch.cat([k_nope, k_pe.expand(-1, -1, H, -1)], dim=-1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(N + P) ** -0.5)
        return self.wo(out.transpose(1, 2).contiguous().view(b, s, -1))


class Textbook(nn.Module):
    """A textbook's layer: no rope (or half rope of a shared key), a cache that grows by ``cat`` as an attribute,
    separate biased up-projections, a mask from ``triu``, masked_fill_ in place, dropout."""

    def __init__(self, rope: bool = False) -> None:
        super().__init__()
        self.pe = P if rope else 0
        self.W_query = nn.Linear(HIDDEN, H * (N + self.pe), bias=True)
        self.W_DKV = nn.Linear(HIDDEN, R, bias=True)
        self.W_KR = nn.Linear(HIDDEN, P, bias=True)
        self.W_UK, self.W_UV = nn.Linear(R, H * N, bias=True), nn.Linear(R, H * V, bias=True)
        self.out_proj, self.dropout = nn.Linear(H * V, HIDDEN), nn.Dropout(0.1)
        self.cache: Tensor | None = None
        self.rope_cache: Tensor | None = None

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.shape
        queries, latent = self.W_query(x), self.W_DKV(x)
        total = latent if self.cache is None else torch.cat([self.cache, latent], dim=1)
        self.cache = total
        queries = queries.view(b, s, H, N + self.pe).transpose(1, 2)
        keys = self.W_UK(total).view(b, -1, H, N).transpose(1, 2)
        values = self.W_UV(total).view(b, -1, H, V).transpose(1, 2)
        if self.pe:
            at = torch.arange(position, position + s)
            new = rope_half(self.W_KR(x), at)
            self.rope_cache = new if self.rope_cache is None else torch.cat([self.rope_cache, new], dim=1)
            queries = torch.cat((queries[..., :N], rope_half(queries[..., N:], at)), -1)
            keys = torch.cat((keys, self.rope_cache.unsqueeze(1).repeat(1, H, 1, 1)), -1)
        scores = queries @ keys.transpose(2, 3)
        t = keys.shape[-2]
        future = torch.triu(torch.ones(s, t), diagonal=t - s + 1).bool()
        scores.masked_fill_(future, -torch.inf)
        weights = self.dropout(torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1))
        return self.out_proj((weights @ values).transpose(1, 2).contiguous().view(b, s, H * V))


class Remote(nn.Module):
    """Published with a checkpoint: keys assembled by slice assignment into an empty tensor, expanded K and V cached
    by ``cat`` (or nothing cached), scores checked and softmaxed in float32, an additive mask."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.cached = cached
        self.q_proj = nn.Linear(HIDDEN, H * (N + P), bias=False)
        self.kv_a, self.kv_norm = nn.Linear(HIDDEN, R + P, bias=False), nn.RMSNorm(R)
        self.kv_b, self.o_proj = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN, bias=False)
        self.past: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.size()
        at = torch.arange(position, position + s)
        q = self.q_proj(x).view(b, s, H, N + P).transpose(1, 2)
        q_nope, q_pe = torch.split(q, [N, P], dim=-1)
        kv, k_pe = torch.split(self.kv_a(x), [R, P], dim=-1)
        k_pe = k_pe.view(b, s, 1, P).transpose(1, 2)
        kv = self.kv_b(self.kv_norm(kv)).view(b, s, H, N + V).transpose(1, 2)
        k_nope, v = torch.split(kv, [N, V], dim=-1)
        q_pe, k_pe = rope_half(q_pe, at), rope_half(k_pe, at)
        query = k_pe.new_empty(b, H, s, N + P)
        query[:, :, :, :N] = q_nope
        query[:, :, :, N:] = q_pe
        key = k_pe.new_empty(b, H, s, N + P)
        key[:, :, :, :N] = k_nope
        key[:, :, :, N:] = k_pe
        if self.cached:
            if self.past is not None:
                key, v = torch.cat((self.past[0], key), 2), torch.cat((self.past[1], v), 2)
            self.past = key, v
        weights = torch.matmul(query, key.transpose(2, 3)) * (N + P) ** -0.5
        if mask is not None:
            weights = weights + mask
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = F.dropout(weights, p=0.0, training=self.training)
        return self.o_proj(torch.matmul(weights, v).transpose(1, 2).contiguous().reshape(b, s, H * V))


class Merged(nn.Module):
    """Heads merged into the batch and scores by ``baddbmm``, tokens first, as large-scale training code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down, self.norm = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P), nn.LayerNorm(R)
        self.up, self.out = nn.Linear(R, H * (N + V)), nn.Linear(H * V, HIDDEN)

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1)  # tokens first
        s, b, _ = x.shape
        q = self.q(x).view(s, b, H, N + P)
        c, pe = self.down(x).split([R, P], -1)
        k, v = self.up(self.norm(c)).view(s, b, H, N + V).split([N, V], -1)
        k = torch.cat((k, pe.unsqueeze(2).expand(s, b, H, P)), -1)
        q, k, v = (t.reshape(s, b * H, -1) for t in (q, k, v))
        room = torch.empty(b * H, s, s)
        scores = torch.baddbmm(
            room, q.transpose(0, 1), k.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=(N + P) ** -0.5
        )
        scores = scores.view(b, H, s, s)
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -10000.0)
        p = scores.softmax(-1).view(b * H, s, s)
        out = torch.bmm(p, v.transpose(0, 1)).view(b, H, s, V)
        return self.out(out.permute(2, 0, 1, 3).reshape(s, b, -1)).transpose(0, 1)


class Padded(nn.Module):
    """What flash attention kernels asked for: ``[B, S, H, D]`` operands, V padded to the width of K, output cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down, self.norm = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P), nn.RMSNorm(R)
        self.up, self.out = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN)

    @staticmethod
    def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=scale)
        return out.transpose(1, 2)

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(s)
        q_nope, q_pe = self.q(x).view(b, s, H, N + P).split([N, P], -1)
        c, pe = self.down(x).split([R, P], -1)
        k, v = self.up(self.norm(c)).view(b, s, H, N + V).split([N, V], -1)
        q_pe = rope_half(q_pe.transpose(1, 2), at).transpose(1, 2)
        k = torch.cat((k, rope_half(pe, at).unsqueeze(2).expand(-1, -1, H, -1)), -1)
        v = F.pad(v, [0, N + P - V])
        out = self.flash(torch.cat((q_nope, q_pe), -1), k, v, (N + P) ** -0.5)
        return self.out(out[:, :, :, :V].reshape(b, s, -1))


class Engine(nn.Module):
    """As serving code decodes: one fused cache, weights kept apart per head for absorption, one key head shared by
    all queries, values a slice of the keys."""

    def __init__(self, batch: int = 2, attention: str = "gqa") -> None:
        super().__init__()
        self.attention = attention
        self.q, self.down, self.norm = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P), nn.RMSNorm(R)
        self.w_kc = nn.Parameter(torch.randn(H, N, R) / R**0.5)
        self.w_vc = nn.Parameter(torch.randn(H, R, V) / R**0.5)
        self.out = nn.Linear(H * V, HIDDEN)
        self.register_buffer("cache", torch.zeros(batch, ROWS, 1, R + P), persistent=False)

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q_nope, q_pe = self.q(x).view(b * s, H, N + P).split([N, P], -1)
        q_nope = torch.bmm(q_nope.transpose(0, 1), self.w_kc).transpose(0, 1).view(b, s, H, R)
        q_pe = rope_half(q_pe.view(b, s, H, P).transpose(1, 2), at).transpose(1, 2)
        c, pe = self.down(x).split([R, P], -1)
        self.cache[:b, position : position + s, 0] = torch.cat((self.norm(c), rope_half(pe, at)), -1)
        kv = self.cache[:b, : position + s]
        q = torch.cat((q_nope, q_pe), -1).transpose(1, 2)
        k, v = kv.transpose(1, 2), kv[..., :R].transpose(1, 2)
        scale = (N + P) ** -0.5
        if self.attention == "gqa":
            out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        elif self.attention == "expand":
            k, v = k.expand(-1, H, -1, -1), v.expand(-1, H, -1, -1)
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            out = ((q @ k.transpose(2, 3)) * scale).softmax(-1) @ v
        out = torch.bmm(out.permute(1, 0, 2, 3).reshape(H, b * s, R), self.w_vc)
        return self.out(out.view(H, b, s, V).permute(1, 2, 0, 3).reshape(b, s, -1))
