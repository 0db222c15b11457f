"""Yet more of ``tests/strangers.py``, some of which only look like latent attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.strangers import HIDDEN, ROWS, H, N, P, R, V, pairs, weight
from tests.wild import angles, rope_complex, rope_half


class FusedDown(nn.Module):
    """One product for the latents of queries, keys and values; complex rope; cached rows begin with the rotary key."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_a = nn.Linear(HIDDEN, 16 + R + P, bias=False)
        self.q_norm, self.kv_norm = nn.RMSNorm(16), nn.RMSNorm(R)
        self.q_b, self.kv_b = weight(16, H, N + P), weight(H, V + N, R)
        self.proj = weight(HIDDEN, H, V)
        self.register_buffer("kv", torch.zeros(2, ROWS, P + R), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        s = x.size(1)
        end, freqs = position + s, angles(torch.arange(position, position + s))
        q, c, pe = torch.split(self.qkv_a(x), (16, R, P), -1)
        q = torch.einsum("bsl,lhd->bshd", self.q_norm(q), self.q_b)
        q_nope, q_pe = q[..., :N], rope_complex(q[..., N:].contiguous(), freqs)
        self.kv[:, position:end, P:] = self.kv_norm(c)
        self.kv[:, position:end, :P] = rope_complex(pe.unsqueeze(2).contiguous(), freqs).squeeze(2)
        pe, c = self.kv[:, :end].tensor_split((P,), -1)
        v, k = torch.einsum("hdr,btr->bhtd", self.kv_b, c).split((V, N), -1)
        scores = torch.einsum("bqhd,bhkd->bhqk", q_nope, k) + torch.einsum("bqhd,bkd->bhqk", q_pe, pe)
        hidden = torch.ones(s, end, dtype=torch.bool).triu(position + 1)
        p = (scores * (N + P) ** -0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,bhkv,mhv->bqm", p, v, self.proj)


class Held(NamedTuple):
    """What a step hands to the next."""

    latent: Tensor
    rotary: Tensor
    length: int


class Rotary(nn.Module):
    """Tables made once, looked up by position."""

    def __init__(self) -> None:
        super().__init__()
        z = angles(torch.arange(ROWS))
        self.register_buffer("cos", torch.cat((z.real, z.real), -1), persistent=False)
        self.register_buffer("sin", torch.cat((z.imag, z.imag), -1), persistent=False)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.addcmul(x * self.cos[at], torch.cat((b.neg(), a), -1), self.sin[at])


class Expand(nn.Module):
    """Keys and values of every head, of a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(R, H * N, bias=False), nn.Linear(R, H * V, bias=True)

    def forward(self, held: Held) -> tuple[Tensor, Tensor]:
        nope = self.key(held.latent).unflatten(-1, (H, N)).movedim(-2, 1)
        rotary = held.rotary[:, None].broadcast_to(*nope.shape[:-1], P)
        return torch.cat((rotary, nope), -1), self.value(held.latent).unflatten(-1, (H, V)).movedim(-2, 1)


class Nested(nn.Module):
    """Modules within modules, caches handed on in a named tuple, rotary lanes first, biased values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.latent, self.rotary_key = (
            nn.Linear(HIDDEN, H * (P + N)),
            nn.Linear(HIDDEN, R),
            nn.Linear(HIDDEN, P),
        )
        self.rotary, self.expand, self.merge = Rotary(), Expand(), nn.Linear(H * V, HIDDEN)
        self.held: Held | None = None

    def forward(self, x: Tensor, position: int) -> Tensor:
        at = torch.arange(x.shape[1]) + position
        c, pe = self.latent(x).tanh(), self.rotary(self.rotary_key(x), at)
        if self.held is not None:
            c, pe = torch.hstack((self.held.latent, c)), torch.hstack((self.held.rotary, pe))
        self.held = Held(c, pe, c.shape[1])
        q = self.query(x).unflatten(-1, (H, P + N)).movedim(-2, 1)
        q = torch.cat((self.rotary(q[..., :P], at), q[..., P:]), -1)
        k, v = self.expand(self.held)
        seen = torch.arange(self.held.length).le(at.unsqueeze(-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.merge(y.movedim(1, -2).flatten(-2))


class Packed(nn.Module):
    """Both sentences in one row, told apart by a mask of their numbers; heads first; a cache of slots, sentence by
    sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wkv = weight(H, HIDDEN, N + P), weight(HIDDEN, R + P)
        self.wk, self.wv, self.wo = weight(H, R, N), weight(H, R, V), weight(H, V, HIDDEN)
        self.register_buffer("slots", torch.zeros(2 * ROWS, R + P), persistent=False)
        self.register_buffer("owner", torch.arange(2).repeat_interleave(ROWS), persistent=False)
        self.register_buffer("place", torch.arange(ROWS).repeat(2), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        who, where = torch.arange(b).repeat_interleave(s), at.repeat(b)
        flat = x.reshape(b * s, HIDDEN)
        q = torch.matmul(flat, self.wq)
        q = torch.cat((q[..., :N], rope_half(q[..., N:], where)), -1)
        new = flat @ self.wkv
        self.slots[who * ROWS + where] = torch.cat((new[:, :R], rope_half(new[:, R:], where)), -1)
        c, pe = self.slots.split([R, P], -1)
        k = torch.cat((torch.matmul(c, self.wk), pe.expand(H, -1, -1)), -1)
        same = who[:, None] == self.owner
        seen = same.logical_and(self.place <= where[:, None])
        bias = torch.where(seen, 0.0, float("-inf"))
        p = torch.softmax(torch.baddbmm(bias.expand(H, -1, -1), q, k.mT, alpha=(N + P) ** -0.5), -1)
        return torch.einsum("hqv,hvm->qm", p @ torch.matmul(c, self.wv), self.wo).view(b, s, HIDDEN)


class Scored(nn.Module):
    """Scores by broadcasting and a sum, the softmax by its exponentials and their sum after values, log lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P)
        self.up, self.o = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN)
        self.register_buffer("cache", torch.zeros(2, ROWS, R + P), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        end, at = position + s, torch.arange(position, position + s)
        q = self.q(x).view(b, s, H, N + P).transpose(1, 2) * (1 + at.float()).log1p()[:, None]
        q = torch.cat((q[..., :N], pairs(q[..., N:], at)), -1)
        c, pe = self.down(x).split([R, P], -1)
        self.cache[:, at] = torch.cat((c * 0.7, pairs(pe, at)), -1)
        c, pe = self.cache[:, :end].split([R, P], -1)
        k, v = self.up(c).view(b, end, H, N + V).permute(0, 2, 1, 3).split([N, V], -1)
        k = torch.cat((k, pe[:, None].expand(b, H, end, P)), -1)
        scores = q.matmul(k.mT).mul((N + P) ** -0.5)
        scores = torch.where(torch.arange(end) > at[:, None], torch.finfo(x.dtype).min, scores)
        p = F.softmax(scores, -1)
        return self.o(torch.matmul(p, v).permute(0, 2, 1, 3).reshape(b, s, -1))


class Near(nn.Module):
    """Latent attention but for one step: "groups" of heads that share an up-projection, a "cap" on the scores, values
    "gated" by their token, keys "turned" by position after the up-projection, chunks joined by a "running" maximum."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step
        self.q, self.down, self.o = nn.Linear(HIDDEN, H * N), nn.Linear(HIDDEN, R), nn.Linear(H * V, HIDDEN)
        heads = H // 2 if step == "groups" else H
        self.up_k, self.up_v, self.gate = nn.Linear(R, heads * N), nn.Linear(R, heads * V), nn.Linear(R, 1)
        self.register_buffer("cache", torch.zeros(2, ROWS, R), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        end, at = position + s, torch.arange(position, position + s)
        self.cache[:, position:end] = self.down(x)
        c = self.cache[:, :end]
        q = self.q(x).view(b, s, H, N).transpose(1, 2)
        k, v = (up(c).view(b, end, -1, width).transpose(1, 2) for up, width in ((self.up_k, N), (self.up_v, V)))
        if self.step == "groups":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.step == "gated":
            v = v * self.gate(c).sigmoid()[:, None]
        if self.step == "turned":
            q, k = (torch.cat((pairs(y[..., :P], z), y[..., P:]), -1) for y, z in ((q, at), (k, torch.arange(end))))
        hidden = torch.arange(end) > at[:, None]
        if self.step == "running":
            return self.o(self.chunks(q, k, v, hidden).transpose(1, 2).reshape(b, s, -1))
        scores = q @ k.transpose(2, 3) * N**-0.5
        scores = 5 * torch.tanh(scores / 5) if self.step == "cap" else scores
        y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, s, -1))

    @staticmethod
    def chunks(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        best = torch.full((*q.shape[:3], 1), -1e9)
        total, out = torch.zeros_like(best), torch.zeros(*q.shape[:3], V)
        for first in range(0, k.shape[2], 4):
            part = slice(first, first + 4)
            scores = (q @ k[:, :, part].mT * N**-0.5).masked_fill(hidden[:, part], -1e9)
            now = torch.maximum(best, scores.amax(-1, keepdim=True))
            p = (scores - now).exp()
            total = total * (best - now).exp() + p.sum(-1, keepdim=True)
            out, best = out * (best - now).exp() + p @ v[:, :, part], now
        return out / total


#: name → module; each has one attention op
MANY: dict[str, Callable[[], nn.Module]] = {
    "fused down projection, rotary key first": FusedDown,
    "nested modules, named tuple": Nested,
    "packed sentences": Packed,
    "queries scaled by log lengths": Scored,
}
#: name → what the reason must say, or "" where nothing is recognised as attention at all
NEAR: dict[str, str] = {
    "groups": "grouped key heads",
    "cap": "",
    "gated": "two different latents",
    "turned": "not linear in a latent|table of positions|different latents",
    "running": "",
}
