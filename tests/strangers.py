"""Latent attention as people write it who have never seen this compiler: one module a style, written apart.

Each has its own idea of layout, weights, rotary keys, scores and cache, and none was written to be recognised. All are
called as ``forward(x [B, S, hidden], position)``, keep their own cache, and are causal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from tests.wild import ROWS as ROWS_WILD
from tests.wild import angles, rope_complex, rope_half

H, HIDDEN, R, N, P, V = 4, 32, 20, 12, 8, 10
ROWS = 32
assert ROWS > ROWS_WILD


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


def pairs(x: Tensor, at: Tensor) -> Tensor:
    """Adjacent values turned as pairs, ``x [..., S, P]``."""
    z = angles(at)
    cos, sin = z.real.repeat_interleave(2, -1), z.imag.repeat_interleave(2, -1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
    return x * cos + turned * sin


class Nano(nn.Module):
    """A minimal teaching model: one fused down projection, everything in one short forward, a cache of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 16 + R + P, bias=False)
        self.q_up, self.kv_up = nn.Linear(16, H * (N + P), bias=False), nn.Linear(R, H * (N + V), bias=False)
        self.c_proj = nn.Linear(H * V, HIDDEN, bias=False)
        self.kv: Any = None

    def forward(self, x: Tensor, position: int) -> Tensor:
        B, T, _ = x.size()
        pos = torch.arange(position, position + T)
        q_lat, c, pe = self.c_attn(x).split([16, R, P], dim=2)
        q = self.q_up(F.rms_norm(q_lat, (16,))).view(B, T, H, N + P).transpose(1, 2)
        q = torch.cat([q[..., :N], rope_half(q[..., N:], pos)], dim=-1)
        c, pe = F.rms_norm(c, (R,)), rope_half(pe, pos)
        if self.kv is not None:
            c, pe = torch.cat([self.kv[0], c], 1), torch.cat([self.kv[1], pe], 1)
        self.kv = (c, pe)
        k, v = self.kv_up(c).view(B, -1, H, N + V).transpose(1, 2).split([N, V], -1)
        k = torch.cat([k, pe[:, None].expand(-1, H, -1, -1)], -1)
        if T > 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, H * V))


class Einsums(nn.Module):
    """Parameters per head, einsum for every product, the softmax by hand, the scale folded into a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wqr = weight(H, N, HIDDEN), weight(H, P, HIDDEN)
        self.wd, self.wkr = weight(HIDDEN, R), weight(HIDDEN, P)
        self.wuk, self.wuv, self.wo = weight(R, H, N), weight(R, H, V), weight(H, V, HIDDEN)
        self.register_buffer("ckv", torch.zeros(2, ROWS, R), persistent=False)
        self.register_buffer("kr", torch.zeros(2, ROWS, P), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        s, at = x.shape[1], torch.arange(position, position + x.shape[1])
        scale = (N + P) ** -0.5
        q = torch.einsum("bsm,hnm->bhsn", x, self.wq * scale)
        qr = pairs(torch.einsum("bsm,hpm->bhsp", x, self.wqr * scale), at)
        self.ckv[:, position : position + s] = torch.einsum("bsm,mr->bsr", x, self.wd)
        self.kr[:, position : position + s] = pairs(torch.einsum("bsm,mp->bsp", x, self.wkr), at)
        c, kr = self.ckv[:, : position + s], self.kr[:, : position + s]
        k, v = torch.einsum("btr,rhn->bhtn", c, self.wuk), torch.einsum("btr,rhv->bhtv", c, self.wuv)
        a = torch.einsum("bhsn,bhtn->bhst", q, k) + torch.einsum("bhsp,btp->bhst", qr, kr)
        seen = torch.arange(position + s)[None, :] <= at[:, None]
        a = torch.where(seen, a, torch.tensor(float("-inf")))
        a = torch.exp(a - a.amax(-1, keepdim=True))
        a = a / a.sum(-1, keepdim=True)
        return torch.einsum("bhst,bhtv,hvm->bsm", a, v, self.wo)


class InputPositions(nn.Module):
    """A fixed cache written at a tensor of positions, and the mask looked up in a table of all causal masks."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wkv_a = nn.Linear(HIDDEN, H * (N + P), bias=False), nn.Linear(HIDDEN, R + P, bias=False)
        self.wkv_b, self.wo = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(R)
        self.register_buffer("cache", torch.zeros(2, ROWS, R + P), persistent=False)
        self.register_buffer("causal_mask", torch.tril(torch.ones(ROWS, ROWS, dtype=torch.bool)), persistent=False)
        self.register_buffer("freqs", angles(torch.arange(ROWS)), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        input_pos = torch.arange(position, position + s)
        freqs, mask = self.freqs[input_pos], self.causal_mask[None, None, input_pos]
        q_nope, q_pe = self.wq(x).view(b, s, H, N + P).split([N, P], -1)
        c, pe = self.wkv_a(x).split([R, P], -1)
        new = torch.cat([self.norm(c), rope_complex(pe.unsqueeze(2), freqs).squeeze(2)], -1)
        self.cache[:, input_pos] = new
        c, pe = self.cache.split([R, P], -1)
        kv = self.wkv_b(c).view(b, ROWS, H, N + V)
        q = torch.cat([rope_complex(q_pe, freqs), q_nope], -1).transpose(1, 2)
        k = torch.cat([pe.unsqueeze(2).repeat(1, 1, H, 1), kv[..., :N]], -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, kv[..., N:].transpose(1, 2), attn_mask=mask)
        return self.wo(y.transpose(1, 2).reshape(b, s, -1))


class SeqFirst(nn.Module):
    """Tokens first, heads merged into the batch for a three-dimensional attention call, writes by ``index_copy_``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_q, self.linear_kv_down = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P)
        self.linear_kv_up, self.linear_proj = nn.Linear(R, H * (N + V)), nn.Linear(H * V, HIDDEN)
        self.layernorm = nn.LayerNorm(R)
        self.register_buffer("latents", torch.zeros(ROWS, 2, R + P), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        x = x.transpose(0, 1)
        s, b, _ = x.shape
        at = torch.arange(position, position + s)
        q = self.linear_q(x).view(s, b, H, N + P)
        q = torch.cat((q[..., :N], rope_half(q[..., N:].permute(1, 2, 0, 3), at).permute(2, 0, 1, 3)), -1)
        c, pe = self.linear_kv_down(x).split([R, P], -1)
        pe = rope_half(pe.transpose(0, 1), at).transpose(0, 1)
        self.latents.index_copy_(0, at, torch.cat((self.layernorm(c), pe), -1))
        held = self.latents[: position + s]
        t = held.shape[0]
        k, v = self.linear_kv_up(held[..., :R]).view(t, b, H, N + V).split([N, V], -1)
        k = torch.cat((k, held[..., R:].unsqueeze(2).expand(t, b, H, P)), -1)
        q, k, v = (y.reshape(y.shape[0], b * H, -1).transpose(0, 1) for y in (q, k, v))
        mask = torch.ones(s, t, dtype=torch.bool).tril(position)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.linear_proj(y.transpose(0, 1).reshape(s, b, H * V)).transpose(0, 1)


class HeadLoop(nn.Module):
    """One head after the other, as slides explain it."""

    def __init__(self) -> None:
        super().__init__()
        self.w_dkv, self.w_kr = nn.Linear(HIDDEN, R, bias=False), nn.Linear(HIDDEN, P, bias=False)
        self.w_q = nn.ModuleList(nn.Linear(HIDDEN, N + P, bias=False) for _ in range(H))
        self.w_uk = nn.ModuleList(nn.Linear(R, N, bias=False) for _ in range(H))
        self.w_uv = nn.ModuleList(nn.Linear(R, V, bias=False) for _ in range(H))
        self.w_o = nn.Linear(H * V, HIDDEN, bias=False)
        self.c_cache: Tensor | None = None
        self.r_cache: Tensor | None = None

    def forward(self, x: Tensor, position: int) -> Tensor:
        s, at = x.shape[1], torch.arange(position, position + x.shape[1])
        c, kr = self.w_dkv(x), rope_half(self.w_kr(x), at)
        self.c_cache = c if self.c_cache is None else torch.cat((self.c_cache, c), dim=1)
        self.r_cache = kr if self.r_cache is None else torch.cat((self.r_cache, kr), dim=1)
        future = torch.arange(position + s)[None] > at[:, None]
        heads = []
        for w_q, w_uk, w_uv in zip(self.w_q, self.w_uk, self.w_uv, strict=True):
            q = w_q(x)
            scores = q[..., :N] @ w_uk(self.c_cache).transpose(1, 2)
            scores = scores + rope_half(q[..., N:], at) @ self.r_cache.transpose(1, 2)
            scores = (scores / math.sqrt(N + P)).masked_fill(future, float("-inf"))
            heads.append(torch.softmax(scores, dim=-1) @ w_uv(self.c_cache))
        return self.w_o(torch.cat(heads, dim=-1))


class OneSentence(nn.Module):
    """No batch axis at all: tensors are ``[heads, tokens, values]``, the mask is added, weights are kept transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wkv_a, self.wo = weight(HIDDEN, H * (N + P)), weight(HIDDEN, R + P), weight(H * V, HIDDEN)
        self.wk_b, self.wv_b = weight(H, R, N), weight(H, R, V)
        self.register_buffer("kv", torch.zeros(ROWS, R + P), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        return torch.stack([self.sentence(x[0], position)])

    def sentence(self, x: Tensor, position: int) -> Tensor:
        n, at = x.shape[0], torch.arange(position, position + x.shape[0])
        q = (x @ self.wq).view(n, H, N + P).permute(1, 0, 2)
        q = torch.cat((q[..., :N], pairs(q[..., N:], at)), -1)
        kv = x @ self.wkv_a
        self.kv[position : position + n] = torch.cat((F.rms_norm(kv[:, :R], (R,)), pairs(kv[:, R:], at)), -1)
        c, pe = self.kv[: position + n, :R], self.kv[: position + n, R:]
        k = torch.cat((torch.matmul(c, self.wk_b), pe.expand(H, -1, -1)), -1)
        v = torch.matmul(c, self.wv_b)
        mask = torch.full((n, position + n), float("-inf")).triu(position + 1)
        kq = torch.softmax(q @ k.transpose(1, 2) * (N + P) ** -0.5 + mask, -1)
        return (kq @ v).permute(1, 0, 2).reshape(n, H * V) @ self.wo


class Tied(nn.Module):
    """Absorbed once and for all: queries projected to the latent, the output projected from it, nothing else kept."""

    def __init__(self) -> None:
        super().__init__()
        self.q_absorbed, self.q_rope = nn.Linear(HIDDEN, H * R, bias=False), nn.Linear(HIDDEN, H * P, bias=False)
        self.down, self.out_absorbed = nn.Linear(HIDDEN, R + P, bias=False), nn.Linear(H * R, HIDDEN, bias=False)
        self.register_buffer("c", torch.zeros(2, ROWS, R), persistent=False)
        self.register_buffer("r", torch.zeros(2, ROWS, P), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        c, r = self.down(x).split([R, P], -1)
        where = at[None, :, None].expand(b, s, R)
        self.c.scatter_(1, where, F.rms_norm(c, (R,)))
        self.r.scatter_(1, where[..., :P], rope_half(r, at))
        q = self.q_absorbed(x).unflatten(-1, (H, R))
        qr = rope_half(self.q_rope(x).unflatten(-1, (H, P)).transpose(1, 2), at)
        scores = torch.einsum("bshr,btr->bhst", q, self.c) + torch.einsum("bhsp,btp->bhst", qr, self.r)
        scores = scores.mul(0.2).masked_fill(~(torch.arange(ROWS) <= at[:, None]), torch.finfo(x.dtype).min)
        latent = torch.einsum("bhst,btr->bshr", scores.softmax(-1), self.c)
        return self.out_absorbed(latent.flatten(2))


class Narrowed(nn.Module):
    """Copies into narrowed caches, an up-projection whose result is unbound into keys and values, heads last."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv_a = nn.Linear(HIDDEN, (N + P) * H), nn.Linear(HIDDEN, R + P)
        self.up, self.o = weight(2, R, N, H), nn.Linear(N * H, HIDDEN)
        self.register_buffer("cache", torch.zeros(2, ROWS, R + P), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q = self.q(x).view(b, s, N + P, H).permute(0, 3, 1, 2)
        q = torch.cat((q[:, :, :, :N], rope_half(q[..., N:], at)), 3)
        c, pe = self.kv_a(x).tensor_split([R], dim=-1)
        self.cache.narrow(1, position, s).copy_(torch.cat((c, rope_half(pe, at)), -1))
        c, pe = self.cache.narrow(1, 0, position + s).tensor_split([R], dim=-1)
        k, v = torch.einsum("btr,crnh->cbhtn", c, self.up).unbind(0)
        k = torch.cat((k, pe.unsqueeze(1).expand(b, H, -1, P)), -1)
        attn = torch.matmul(q, k.mT).div(math.sqrt(N + P))
        attn = attn + torch.zeros(s, position + s).masked_fill(torch.arange(position + s) > at[:, None], -1e30)
        y = F.softmax(attn, dim=-1).matmul(v)
        return self.o(y.permute(0, 2, 3, 1).reshape(b, s, N * H))


class Flexible(nn.Module):
    """Attention by ``flex_attention`` with a causal mask function."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wkv_a = nn.Linear(HIDDEN, H * (N + P), bias=False), nn.Linear(HIDDEN, R + P, bias=False)
        self.wkv_b, self.wo = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN, bias=False)
        self.register_buffer("cache", torch.zeros(2, ROWS, R + P), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q = self.wq(x).view(b, s, H, N + P).transpose(1, 2)
        q = torch.cat([q[..., :N], pairs(q[..., N:], at)], -1)
        c, pe = self.wkv_a(x).split([R, P], -1)
        self.cache[:, position : position + s] = torch.cat((c, pairs(pe, at)), -1)
        c, pe = self.cache[:, : position + s].split([R, P], -1)
        k, v = self.wkv_b(c).view(b, -1, H, N + V).transpose(1, 2).split([N, V], -1)
        k = torch.cat([k, pe.unsqueeze(1).expand(-1, H, -1, -1)], -1)

        def causal(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, token: Tensor) -> Tensor:
            return torch.where(token <= query + position, score, float("-inf"))

        y = flex_attention(q, k, v, score_mod=causal, scale=(N + P) ** -0.5)
        return self.wo(y.transpose(1, 2).flatten(2))


class Adapted(nn.Module):
    """Up-projections made on the fly: a frozen weight in int8 with scales, a low-rank adapter, weight normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P), bias=False), nn.Linear(HIDDEN, R + P, bias=False)
        self.register_buffer("codes", torch.randint(-127, 128, (H * N, R), dtype=torch.int8))
        self.scales, self.a, self.b = nn.Parameter(torch.rand(H * N, 1) / 400), weight(4, R), weight(H * N, 4)
        self.direction, self.length = weight(H * V, R), nn.Parameter(torch.rand(H * V, 1) + 0.5)
        self.o = nn.Linear(H * V, HIDDEN, bias=False)
        self.past: list[Tensor] = []

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q = self.q(x).view(b, s, H, -1).transpose(1, 2)
        q = torch.cat((q[..., :N], rope_half(q[..., N:], at)), -1)
        new = self.down(x)
        self.past.append(torch.cat((new[..., :R], rope_half(new[..., R:], at)), -1))
        held = torch.cat(self.past, 1)
        w_k = self.codes.to(x.dtype) * self.scales + 0.5 * self.b @ self.a
        w_v = self.length * self.direction / self.direction.norm(dim=1, keepdim=True)
        k = F.linear(held[..., :R], w_k).view(b, -1, H, N).transpose(1, 2)
        k = torch.cat((k, held[:, None, :, R:].expand(b, H, -1, P)), -1)
        v = F.linear(held[..., :R], w_v).view(b, -1, H, V).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) / (N + P) ** 0.5
        if s > 1:
            scores = scores + torch.triu(torch.full((s, s), float("-inf")), 1)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1))


class InHalf(nn.Module):
    """A model in bfloat16 whose attention is computed in float32, operands and all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P), bias=False), nn.Linear(HIDDEN, R + P, bias=False)
        self.up, self.o = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN, bias=False)
        self.register_buffer("cache", torch.zeros(2, ROWS, R + P), persistent=False)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor, position: int) -> Tensor:
        dtype, x = x.dtype, x.to(self.q.weight.dtype)
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q = self.q(x).view(b, s, H, -1).transpose(1, 2)
        q = torch.cat((q[..., :N], rope_half(q[..., N:], at).to(q.dtype)), -1)
        c, pe = self.down(x).split([R, P], -1)
        self.cache[:, position : position + s] = torch.cat((c, rope_half(pe, at).to(c.dtype)), -1)
        c, pe = self.cache[:, : position + s].split([R, P], -1)
        k, v = self.up(c).view(b, -1, H, N + V).transpose(1, 2).split([N, V], -1)
        k = torch.cat((k, pe[:, None].expand(-1, H, -1, -1)), -1)
        scores = q.float() @ k.float().transpose(2, 3) * (N + P) ** -0.5
        scores = scores + torch.full((s, position + s), float("-inf")).triu(position + 1)
        y = torch.softmax(scores, -1) @ v.float()
        return self.o(y.transpose(1, 2).reshape(b, s, -1).to(x.dtype)).to(dtype)


class Windowed(nn.Module):
    """The last tokens only, in a ring, with the positions that are held beside it."""

    def __init__(self, window: int = 8) -> None:
        super().__init__()
        self.window = window
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P), bias=False), nn.Linear(HIDDEN, R + P, bias=False)
        self.up, self.o = nn.Linear(R, H * (N + V), bias=True), nn.Linear(H * V, HIDDEN, bias=False)
        self.register_buffer("ring", torch.zeros(2, window, R + P), persistent=False)
        self.register_buffer("held", torch.full((window,), -1), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q = self.q(x).view(b, s, H, -1).transpose(1, 2)
        q = torch.cat((q[..., :N], rope_half(q[..., N:], at)), -1)
        c, pe = self.down(x).split([R, P], -1)
        slots = at % self.window
        self.ring[:, slots] = torch.cat((F.rms_norm(c, (R,)), rope_half(pe, at)), -1)
        self.held[slots] = at
        k, v = self.up(self.ring[..., :R]).view(b, -1, H, N + V).transpose(1, 2).split([N, V], -1)
        k = torch.cat((k, self.ring[:, None, :, R:].expand(-1, H, -1, -1)), -1)
        seen = (self.held >= 0) & (self.held <= at[:, None]) & (self.held > at[:, None] - self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


class Autocast(nn.Module):
    """Weights in float32, products in bfloat16 by autocast, latents cached in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Nano()

    def forward(self, x: Tensor, position: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x, position).to(x.dtype)


class Grouped(nn.Module):
    """One key head that all query heads share, five axes, values cut out of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P)
        self.w_uk, self.w_uv, self.o = weight(H, N, R), weight(H, V, R), nn.Linear(H * V, HIDDEN)
        self.past: Tensor | None = None

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q_nope, q_pe = self.q(x).view(b, s, 1, H, N + P).split([N, P], -1)
        q_nope = torch.einsum("bsghn,hnr->bsghr", q_nope, self.w_uk)
        q_pe = rope_half(q_pe.transpose(1, 3), at).transpose(1, 3)
        c, pe = self.down(x).split([R, P], -1)
        new = torch.cat((F.layer_norm(c, (R,)), rope_half(pe, at)), -1).unsqueeze(2)
        self.past = new if self.past is None else torch.cat((self.past, new), 1)
        k = self.past
        scores = torch.einsum("bsghd,btgd->bghst", torch.cat((q_nope, q_pe), -1), k) * (N + P) ** -0.5
        scores = scores + torch.full((s, position + s), -1e9).triu(position + 1)
        y = torch.einsum("bghst,btgr->bsghr", scores.softmax(-1), k[..., :R])
        return self.o(torch.einsum("bsghr,hvr->bsghv", y, self.w_uv).reshape(b, s, H * V))


#: name → (module, batch)
STRANGERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "minimal, fused down projection": (Nano, 2),
    "einsum and parameters": (Einsums, 2),
    "tensor positions, table of masks": (InputPositions, 2),
    "tokens first, three axes": (SeqFirst, 2),
    "one head after the other": (HeadLoop, 2),
    "one sentence without a batch": (OneSentence, 1),
    "absorbed into the outer projections": (Tied, 2),
    "narrowed caches, heads last": (Narrowed, 2),
    "flex_attention": (Flexible, 2),
    "weights made on the fly": (Adapted, 2),
    "half precision, attention in single": (InHalf, 2),
    "ring of the last tokens": (Windowed, 2),
    "autocast": (Autocast, 2),
    "one key head, five axes": (Grouped, 2),
}
