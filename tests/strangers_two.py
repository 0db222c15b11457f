"""More of ``tests/strangers.py``: unusual layouts, caches and orders of the products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.strangers import HIDDEN, ROWS, H, N, P, R, V, pairs, weight
from tests.wild import rope_half


class Paged(nn.Module):
    """As a serving engine: a flat batch of tokens, pages of latents found through a table, one token a sequence."""

    PAGE = 4

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv_a = nn.Linear(HIDDEN, H * (N + P), bias=False), nn.Linear(HIDDEN, R + P, bias=False)
        self.w_uk_t, self.w_uv, self.o = weight(H, N, R), weight(H, R, V), nn.Linear(H * V, HIDDEN, bias=False)
        pages = ROWS // self.PAGE
        self.register_buffer("pool", torch.zeros(2 * pages, self.PAGE, R + P), persistent=False)
        self.register_buffer("table", torch.randperm(2 * pages).view(2, pages), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        return torch.stack([self.step(x[:, i], position + i) for i in range(x.shape[1])], 1)

    def step(self, x: Tensor, position: int) -> Tensor:
        at = torch.full((x.shape[0],), position)
        q_nope, q_pe = self.q(x).view(-1, H, N + P).split([N, P], -1)
        c, pe = self.kv_a(x).split([R, P], -1)
        q_pe, pe = pairs(q_pe, at[:1]), pairs(pe, at[:1])
        slot = self.table.gather(1, (at // self.PAGE)[:, None])[:, 0]
        self.pool[slot, at % self.PAGE] = torch.cat((F.rms_norm(c, (R,)), pe), -1)
        q = torch.cat((torch.bmm(q_nope.transpose(0, 1), self.w_uk_t).transpose(0, 1), q_pe), -1)
        kv = self.pool[self.table].flatten(1, 2)
        scores = torch.einsum("bhd,btd->bht", q, kv) * (N + P) ** -0.5
        scores = scores.masked_fill(torch.arange(ROWS) >= (at + 1)[:, None, None], float("-inf"))
        out = torch.einsum("bht,btr->bhr", scores.softmax(-1), kv[..., :R])
        return self.o(torch.bmm(out.transpose(0, 1), self.w_uv).transpose(0, 1).flatten(1))


class HalfAbsorbed(nn.Module):
    """Keys expanded by a broadcast product, values left in the latent and projected after attention."""

    def __init__(self, keys: bool = True) -> None:
        super().__init__()
        self.keys = keys
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P), bias=False), nn.Linear(HIDDEN, R + P, bias=False)
        self.w_uk, self.w_uv, self.o = weight(H, R, N), weight(H, R, V), nn.Linear(H * V, HIDDEN, bias=False)
        self.past: Tensor | None = None

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q_nope, q_pe = self.q(x).view(b, s, H, N + P).transpose(1, 2).split([N, P], -1)
        c, pe = self.down(x).split([R, P], -1)
        new = torch.cat((F.rms_norm(c, (R,)), rope_half(pe, at)), -1)
        self.past = new if self.past is None else torch.cat((self.past, new), 1)
        c, pe = self.past.split([R, P], -1)
        if self.keys:
            k, v = c.unsqueeze(1) @ self.w_uk, c.unsqueeze(1).expand(-1, H, -1, -1)
        else:
            k, v = c.unsqueeze(1).expand(-1, H, -1, -1), c.unsqueeze(1) @ self.w_uv
            q_nope = q_nope @ self.w_uk.transpose(1, 2)
        q = torch.cat((q_nope, rope_half(q_pe, at)), -1)
        k = torch.cat((k, pe.unsqueeze(1).expand(-1, H, -1, -1)), -1)
        mask = torch.ones(s, position + s, dtype=torch.bool).tril(position)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=(N + P) ** -0.5)
        y = y @ self.w_uv if self.keys else y
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


class Columns(nn.Module):
    """Latents as columns, weights on the left of every product, a temperature for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = weight(H * (N + P), HIDDEN), weight(R + P, HIDDEN)
        self.up_k, self.up_v, self.o = weight(H * N, R), weight(H * V, R), weight(HIDDEN, H * V)
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.1)
        self.register_buffer("latents", torch.zeros(2, R + P, ROWS), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        end, at = position + s, torch.arange(position, position + s)
        q = torch.matmul(self.q, x.mT).view(b, H, N + P, s)
        q = torch.cat((q[:, :, :N], pairs(q[:, :, N:].mT, at).mT), 2)
        c = torch.matmul(self.down, x.mT)
        self.latents[:, :, position:end] = torch.cat((c[:, :R], pairs(c[:, R:].mT, at).mT), 1)
        held = self.latents[:, :, :end]
        k = torch.tensordot(self.up_k, held[:, :R], ([1], [1])).transpose(0, 1).reshape(b, H, N, end)
        v = torch.matmul(self.up_v, held[:, :R]).view(b, H, V, end)
        k = torch.cat((k, held[:, None, R:].expand(b, H, P, end)), 2)
        scores = (k.mT @ q) * self.temperature + torch.zeros(end, s).masked_fill(
            torch.arange(end)[:, None] > at, float("-inf")
        )
        y = v @ scores.softmax(-2)
        return torch.matmul(self.o, y.reshape(b, H * V, s)).mT


class Rolled(nn.Module):
    """A window that is rolled by one at every token, latents kept as int8 with a scale a token."""

    def __init__(self, window: int = 8) -> None:
        super().__init__()
        self.window = window
        self.q, self.down = nn.Linear(HIDDEN, H * N, bias=False), nn.Linear(HIDDEN, R, bias=False)
        self.up, self.o = nn.Linear(R, H * (N + V), bias=True), nn.Linear(H * V, HIDDEN, bias=False)
        self.register_buffer("codes", torch.zeros(2, window, R, dtype=torch.int8), persistent=False)
        self.register_buffer("scales", torch.zeros(2, window, 1), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        return torch.cat([self.step(x[:, i : i + 1], position + i) for i in range(x.shape[1])], 1)

    def step(self, x: Tensor, position: int) -> Tensor:
        b = x.shape[0]
        c = self.down(x)
        scale = c.abs().amax(-1, keepdim=True) / 127
        self.codes.copy_(torch.cat((self.codes[:, 1:], (c / scale).round().to(torch.int8)), 1))
        self.scales.copy_(torch.roll(self.scales, -1, 1))
        self.scales[:, -1:] = scale
        held = self.codes.to(x.dtype) * self.scales
        k, v = self.up(held).view(b, self.window, H, N + V).transpose(1, 2).tensor_split([N], -1)
        q = self.q(x).view(b, 1, H, N).transpose(1, 2)
        seen = torch.arange(self.window) >= self.window - 1 - position
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(b, 1, 1, -1))
        return self.o(y.transpose(1, 2).reshape(b, 1, -1))


class QueryBlocks(nn.Module):
    """A few queries at a time, each block on all keys, in a wrapper that takes and gives ``[B, S, H, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P)
        self.up, self.o = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN)
        self.register_buffer("cache", torch.zeros(2, ROWS, R + P), persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        _, s, _ = x.shape
        end, at = position + s, torch.arange(position, position + s)
        q = self.q(x).unflatten(-1, (H, N + P))
        q = torch.cat((q[..., :N], pairs(q[..., N:].transpose(1, 2), at).transpose(1, 2)), -1)
        c, pe = self.down(x).split([R, P], -1)
        self.cache[:, position:end] = torch.cat((c, pairs(pe, at)), -1)
        k, v = self.up(self.cache[:, :end, :R]).unflatten(-1, (H, N + V)).split([N, V], -1)
        k = torch.cat((k, self.cache[:, :end, None, R:].expand(-1, -1, H, -1)), -1)
        out = []
        for first in range(0, s, 4):
            block, rows = q[:, first : first + 4], at[first : first + 4]
            out.append(self.attend(block, k, v, torch.arange(end) <= rows[:, None]))
        return self.o(torch.cat(out, 1).flatten(2))

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (y.permute(0, 2, 1, 3) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).permute(0, 2, 1, 3)


class Shared(nn.Module):
    """Two attention layers that read the latents of the first, each with weights and rope of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(HIDDEN, R + P, bias=False)
        self.q = nn.ModuleList(nn.Linear(HIDDEN, H * (N + P)) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(R, H * (N + V)) for _ in range(2))
        self.o = nn.ModuleList(nn.Linear(H * V, HIDDEN) for _ in range(2))
        self.past: Tensor | None = None

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        new = self.down(x)
        self.past = new if self.past is None else torch.cat((self.past, new), 1)
        c, pe = F.layer_norm(self.past[..., :R], (R,)), self.past[..., R:]
        for q, up, o, turn in zip(self.q, self.up, self.o, (pairs, rope_half), strict=True):
            queries = q(x).view(b, s, H, N + P).transpose(1, 2)
            k, v = up(c).view(b, -1, H, N + V).transpose(1, 2).split([N, V], -1)
            queries = torch.cat((queries[..., :N], turn(queries[..., N:], at)), -1)
            turned = turn(pe, torch.arange(position + s)).unsqueeze(1)
            k = torch.cat((k, turned.repeat_interleave(H, 1)), -1)
            scores = torch.matmul(queries, k.transpose(-1, -2)) / (N + P) ** 0.5
            scores += torch.full((s, position + s), float("-inf")).triu(position + 1)
            x = x + o(
                (torch.nn.functional.softmax(scores, -1, dtype=torch.float32).type_as(v) @ v).transpose(1, 2).flatten(2)
            )
        return x


class Mapped(nn.Module):
    """Written for one sentence and mapped over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P)
        self.up, self.o = nn.Linear(R, H * (N + V)), nn.Linear(H * V, HIDDEN)
        self.past: Tensor | None = None

    def forward(self, x: Tensor, position: int) -> Tensor:
        new = self.down(x)
        at = torch.arange(position, position + x.shape[1])
        new = torch.cat((new[..., :R], rope_half(new[..., R:], at)), -1)
        self.past = new if self.past is None else torch.cat((self.past, new), 1)
        return torch.vmap(self.sentence, in_dims=(0, 0, None))(x, self.past, at)

    def sentence(self, x: Tensor, held: Tensor, at: Tensor) -> Tensor:
        q = self.q(x).view(-1, H, N + P).transpose(0, 1)
        q = torch.cat((q[..., :N], rope_half(q[..., N:], at)), -1)
        k, v = self.up(held[:, :R]).view(-1, H, N + V).transpose(0, 1).split([N, V], -1)
        k = torch.cat((k, held[:, R:].expand(H, -1, P)), -1)
        scores = q @ k.transpose(1, 2) * (N + P) ** -0.5
        scores = torch.where(torch.arange(held.shape[0]) <= at[:, None], scores, float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


class TwoRuns(nn.Module):
    """Cached and new tokens expanded apart and joined after."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(HIDDEN, H * (N + P)), nn.Linear(HIDDEN, R + P)
        self.up, self.o = nn.Linear(R, H * (N + V), bias=False), nn.Linear(H * V, HIDDEN)
        self.past: Tensor | None = None

    def expand(self, held: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.up(held[..., :R]).view(held.shape[0], -1, H, N + V).transpose(1, 2).split([N, V], -1)
        return torch.cat((k, held[:, None, :, R:].expand(-1, H, -1, -1)), -1), v

    def forward(self, x: Tensor, position: int) -> Tensor:
        b, s, _ = x.shape
        at = torch.arange(position, position + s)
        q = self.q(x).view(b, s, H, N + P).transpose(1, 2)
        q = torch.cat((q[..., :N], rope_half(q[..., N:], at)), -1)
        c, pe = self.down(x).split([R, P], -1)
        new = torch.cat((F.rms_norm(c, (R,)), rope_half(pe, at)), -1)
        k, v = self.expand(new)
        if self.past is not None:
            old_k, old_v = self.expand(self.past)
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        self.past = new if self.past is None else torch.cat((self.past, new), 1)
        mask = torch.ones(s, position + s, dtype=torch.bool).tril(position)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


#: name → (module, batch, attention ops)
MORE: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "pages and a flat batch": (Paged, 2, 1),
    "keys expanded, values not": (HalfAbsorbed, 2, 1),
    "values expanded, keys not": (lambda: HalfAbsorbed(keys=False), 2, 1),
    "latents as columns": (Columns, 2, 1),
    "rolled int8 codes": (Rolled, 2, 1),
    "blocks of queries": (QueryBlocks, 2, 1),
    "two layers on one cache": (Shared, 2, 2),
    "mapped over the batch": (Mapped, 2, 1),
}
