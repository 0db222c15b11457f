"""Latent attention written in many ways: one module whose independent choices compose, and near misses of it.

``compose`` makes the choices, with whatever chooses: hypothesis in the tests, a seeded generator in
``tests/many_spellings.py``. None of the choices changes what is computed beyond a permutation of weights; the compiler
has to see through all of them. A near miss is the same module with one step that latent attention does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

#: What each field of a Spelling can be.
CHOICES: dict[str, tuple[Any, ...]] = {
    "attention": ("sdpa", "matmul", "einsum", "bshd", "two_terms", "merged", "keys_left", "exponentials"),
    "projection": ("joint", "separate", "slices", "blocks", "layers", "adapter", "dequantized", "absorbed"),
    "order": ("nope_rope", "rope_nope"),
    "rope": ("half", "interleaved", "complex", "none"),
    "turned": ("written", "read", "expanded"),
    "spread": ("expand", "repeat", "interleave", "copies"),
    "cache": ("none", "apart", "fused", "growing", "indexed"),
    "mask": ("none", "bool", "additive", "causal", "computed"),
    "norm": ("before", "after", "off"),
    "scale": ("scores", "queries", "keys", "both", "shared"),
    "gate": ("none", "head", "value"),
    "key_scale": (1.0, 0.37),
    "latent_scale": (1.0, 1.7),
    "v_bias": (False, True),
    "k_bias": (False, True),
    "v_padded": (False, True),
    "sink": (False, True),
    "dtype": (torch.float32, torch.float64),
}
SIZES: dict[str, tuple[int, ...]] = {
    "heads": (2, 3, 4, 5),
    "rank": (2, 5, 8, 16, 24, 33),
    "nope": (2, 4, 7, 12, 16),
    "rope_width": (2, 4, 8),
    "v": (2, 5, 8, 12),
    "hidden": (16, 40),
}
#: Near misses, and what the reason must say.
NEAR: dict[str, str] = {
    "rope keys of every head": "latents|not linear in|table of positions|rotary key differs",
    "rope keys scaled by head": "rotary key differs from head to head|different latents",
    "a nonlinearity behind the projection": "not linear",
    "keys normalized head by head": "not linear",
    "values of another latent": "different latents",
    "a weight that the input makes": "up-projection weight depends on the input|different latents",
    "a table of positions on the keys": "table of positions|different latents",
    "grouped key heads over a latent": r"heads share \d+ (key|value) up-projections",
    "grouped-query attention": "grouped-query",
    "a mask of every head": "mask differs from head to head",
    "keys of every head cached": "for every head|of every head",
    "queries, keys and values of one tensor": "ordinary multi-head attention",
    "one key and one value head": "multi-query attention|different latents",
    "capped scores": "not written as",
}


@dataclass(frozen=True)
class Spelling:
    """One way to write latent attention.

    attention: how scores, softmax and values are spelled. projection: how w_uk and w_uv are stored.
    order: which part of a key comes first. rope: how the rotary part is turned. turned: when the rotary key is turned:
    before the cache, after it, or after it was expanded to heads. spread: how it is expanded. cache: what is stored
    between steps. scale: where the scale is applied (shared: half to queries and half to keys of the rotary part).
    near: which near miss it is, if any.
    """

    attention: str = "sdpa"
    projection: str = "joint"
    order: str = "nope_rope"
    rope: str = "half"
    turned: str = "written"
    spread: str = "expand"
    cache: str = "none"
    mask: str = "bool"
    norm: str = "before"
    scale: str = "scores"
    gate: str = "none"
    key_scale: float = 1.0
    latent_scale: float = 1.0
    v_bias: bool = False
    k_bias: bool = False
    v_padded: bool = False
    sink: bool = False
    dtype: torch.dtype = torch.float32
    near: str = ""
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

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Spelling({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


Choose = Callable[[Sequence[Any]], Any]


def compose(choose: Choose) -> Spelling:
    """A spelling by choices; those that exclude each other are brought into line."""
    return _consistent(Spelling(**{name: choose(options) for name, options in (CHOICES | SIZES).items()}))


def compose_near_miss(choose: Choose) -> Spelling:
    """A near miss by choices."""
    s = replace(compose(choose), near=choose(tuple(NEAR)))
    plain: dict[str, Any] = {"projection": choose(("joint", "separate", "slices", "blocks"))}
    if s.near.startswith("rope"):
        plain |= {"rope": choose(("half", "interleaved")), "turned": "written", "spread": "expand"}
    if s.near.startswith(("keys of", "queries,", "one key", "values of", "grouped", "a weight", "a table", "rope")):
        plain |= {"cache": "none"}
    if s.near in ("queries, keys and values of one tensor", "one key and one value head"):
        plain |= {"rope": "none", "norm": "before", "k_bias": False, "latent_scale": 1.0, "projection": "separate"}
        plain |= {"hidden": s.heads * s.nope, "rank": s.heads * s.nope}
    if s.near == "grouped-query attention":
        plain |= {"attention": "sdpa", "mask": choose(("none", "bool"))}
    if s.near.startswith("grouped"):
        plain |= {"heads": 4, "projection": "separate"}
    if s.near == "a mask of every head":
        plain |= {"mask": choose(("bool", "additive"))}
    if s.near == "capped scores":
        plain |= {"attention": choose(("matmul", "einsum", "bshd", "two_terms")), "scale": "scores"}
    return _consistent(replace(s, **plain))


def _consistent(s: Spelling) -> Spelling:
    changes: dict[str, Any] = {}
    if s.attention in ("sdpa", "two_terms"):
        changes["sink"] = False if s.attention == "sdpa" else s.sink
    if s.mask == "causal" and (s.attention != "sdpa" or s.cache != "none"):
        changes["mask"] = "computed"
    if s.rope == "none":
        changes |= {"turned": "written", "spread": "expand"}
    elif s.cache == "none" and s.turned == "written":
        changes["turned"] = "read"
    if s.projection in ("slices", "layers", "adapter", "dequantized", "absorbed"):
        changes |= {"k_bias": False, "v_bias": s.v_bias and s.projection == "layers"}
    if s.projection in ("joint", "blocks"):
        changes["v_bias"] = s.k_bias
    if s.projection == "absorbed":
        changes |= {"turned": "read" if s.turned == "expanded" else s.turned, "spread": "expand", "v_padded": False}
        changes |= {"scale": "scores" if s.scale in ("keys", "both", "shared") else s.scale, "key_scale": 1.0}
    if s.v > s.nope + s.pe:
        changes["v_padded"] = False
    return replace(s, **changes)


def turn(x: Tensor, positions: Tensor, kind: str) -> Tensor:
    """Rotary embedding of ``[..., S, P]`` at integer positions ``[S]``."""
    width = x.shape[-1]
    angle = positions[:, None].to(x.dtype) / 100 ** (torch.arange(0, width, 2, device=x.device) / width).to(x.dtype)
    if kind == "complex":
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.view_as_real(turned).flatten(-2)
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
        self.context = context
        self.q_proj = nn.Linear(s.hidden, h * qk, bias=False)
        self.down = nn.Linear(s.hidden, s.rank + s.pe, bias=False)
        self.norm = nn.RMSNorm(s.rank)
        self.gates = nn.Linear(s.hidden, h * (s.v if s.gate == "value" else 1))
        self.sinks = nn.Parameter(torch.randn(h))
        groups = h // 2 if s.near == "grouped key heads over a latent" else h
        if s.projection == "joint":
            self.up = nn.Linear(s.rank, h * (s.nope + s.v), bias=s.v_bias or s.k_bias)
        elif s.projection == "blocks":
            self.up = nn.Linear(s.rank, h * s.nope + h * s.v, bias=s.v_bias or s.k_bias)
        elif s.projection == "separate":
            self.up_k = nn.Linear(s.rank, groups * s.nope, bias=s.k_bias)
            self.up_v = nn.Linear(s.rank, groups * s.v, bias=s.v_bias)
        elif s.projection == "layers":
            self.ups = nn.ModuleList(nn.Linear(s.rank, s.nope + s.v, bias=s.v_bias) for _ in range(h))
        elif s.projection == "adapter":
            self.up = nn.Linear(s.rank, h * (s.nope + s.v), bias=False)
            self.adapter = nn.Sequential(nn.Linear(s.rank, 2, bias=False), nn.Linear(2, h * (s.nope + s.v), bias=False))
        else:
            self.w = nn.Parameter(torch.randn(h, s.nope + s.v, s.rank) / math.sqrt(s.rank))
            self.w_scale = nn.Parameter(torch.rand(-(-h * (s.nope + s.v) // 4), -(-s.rank // 4)) + 0.5)
        self.out = nn.Linear(h * s.v, s.hidden, bias=False)
        rows = context if s.cache != "growing" else context - 1
        if s.cache in ("apart", "growing", "indexed"):
            self.register_buffer("cache_c", torch.zeros(batch, rows, s.rank), persistent=False)
            self.register_buffer("cache_pe", torch.zeros(batch, rows, s.pe), persistent=False)
        elif s.cache == "fused":
            self.register_buffer("cache", torch.zeros(batch, context, s.rank + s.pe), persistent=False)
        self.extra = nn.ParameterDict(_extra(s, context))
        self.to(s.dtype)

    def latents(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """c_kv ``[B, T, R]`` and k_pe ``[B, T, P]`` of all tokens to attend to."""
        s = self.s
        _, n, _ = x.shape
        c, pe = self.down(x).split([s.rank, s.pe], -1)
        if s.norm == "before":
            c = self.norm(c) * s.latent_scale
        if s.turned == "written" and s.pe:
            pe = turn(pe, torch.arange(n, device=x.device) + position, s.rope)
        c, pe = self.through_cache(c, pe, position)
        if s.norm == "after":
            c = self.norm(c) * s.latent_scale
        if s.turned == "read":
            pe = turn(pe, torch.arange(pe.shape[1], device=x.device), s.rope)
        return c, pe

    def through_cache(self, c: Tensor, pe: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """New rows written, all rows read."""
        s = self.s
        b, n, _ = c.shape
        if s.cache == "apart":
            self.cache_c[:b, position : position + n] = c
            self.cache_pe[:b, position : position + n] = pe
            return self.cache_c[:b], self.cache_pe[:b]
        if s.cache == "indexed":
            rows = torch.arange(n, device=c.device) + position
            self.cache_c.index_copy_(1, rows, c)
            self.cache_pe.index_copy_(1, rows, pe)
            return self.cache_c, self.cache_pe
        if s.cache == "growing":
            rows = self.context - n
            return torch.cat((self.cache_c[:b, :rows], c), 1), torch.cat((self.cache_pe[:b, :rows], pe), 1)
        if s.cache == "fused":
            self.cache[:b, position : position + n] = torch.cat((c, pe), -1)
            return self.cache[:b, :, : s.rank], self.cache[:b, :, s.rank :]
        return c, pe

    def expand(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """k_nope and v as ``[B, T, H, ·]``."""
        s = self.s
        b, t, _ = c.shape
        if s.projection in ("joint", "adapter"):
            kv = self.up(c) if s.projection == "joint" else self.up(c) + self.adapter(c)
            kv = kv.view(b, t, s.heads, s.nope + s.v)
            return kv[..., : s.nope], kv[..., s.nope :]
        if s.projection == "blocks":
            k, v = self.up(c).split([s.heads * s.nope, s.heads * s.v], -1)
            return k.reshape(b, t, s.heads, s.nope), v.reshape(b, t, s.heads, s.v)
        if s.projection == "separate":
            return self.up_k(c).view(b, t, -1, s.nope), self.up_v(c).view(b, t, -1, s.v)
        if s.projection == "layers":
            kv = torch.stack([up(c) for up in self.ups], 2)
            return kv[..., : s.nope], kv[..., s.nope :]
        if s.projection == "dequantized":
            w = self.w.flatten(0, 1)
            blocks = self.w_scale.repeat_interleave(4, 0).repeat_interleave(4, 1)[: w.shape[0], : w.shape[1]]
            kv = linear(c, w * blocks).view(b, t, s.heads, -1)
            return kv[..., : s.nope], kv[..., s.nope :]
        k = torch.einsum("btr,hnr->bthn", c, self.w[:, : s.nope])
        return k, torch.einsum("btr,hvr->bthv", c, self.w[:, s.nope :])

    def to_heads(self, pe: Tensor) -> Tensor:
        """The rotary key ``[B, T, H, P]`` of every head."""
        s = self.s
        pe = pe[:, :, None]
        if s.spread == "repeat":
            pe = pe.repeat(1, 1, s.heads, 1)
        elif s.spread == "interleave":
            pe = pe.repeat_interleave(s.heads, 2)
        elif s.spread == "copies":
            pe = torch.cat([pe] * s.heads, 2)
        else:
            pe = pe.expand(-1, -1, s.heads, -1)
        if s.turned == "expanded":
            return turn(pe.transpose(1, 2), torch.arange(pe.shape[1], device=pe.device), s.rope).transpose(1, 2)
        return pe

    def forward(self, x: Tensor, position: int = 0, mask: Tensor | None = None) -> Tensor:
        s = self.s
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, s.heads, s.nope + s.pe)
        q_nope, q_pe = q.split([s.nope, s.pe], -1)
        if s.pe:
            q_pe = turn(q_pe.transpose(1, 2), torch.arange(n, device=x.device) + position, s.rope).transpose(1, 2)
        c, pe = self.latents(x, position)
        if s.mask == "computed":
            mask = torch.arange(c.shape[1], device=x.device) <= torch.arange(n, device=x.device)[:, None] + position
            mask = mask[None, None]
        if s.near:
            c, pe, mask = near_latents(self, x, c, pe, mask)
        if s.projection == "absorbed":
            out = self.on_latent(q_nope, q_pe, c, pe, mask)
        else:
            k_nope, v = self.expand(c)
            k_nope, pe = k_nope * s.key_scale, self.to_heads(pe)
            if s.near:
                k_nope, v, pe = near_keys(self, x, c, k_nope, v, pe)
            out = self.on_heads(q_nope, q_pe, k_nope, pe, v, mask)
        if s.gate != "none":
            out = out * torch.sigmoid(self.gates(x)).view(b, n, s.heads, -1)
        return self.out(out.reshape(b, n, -1))

    def scales(self) -> tuple[float, float, float]:
        """Factors on queries, keys and scores that together are the scale."""
        scale = 1 / math.sqrt(self.s.nope + self.s.pe)
        return {
            "scores": (1.0, 1.0, scale),
            "queries": (scale, 1.0, 1.0),
            "keys": (1.0, scale, 1.0),
            "both": (math.sqrt(scale), math.sqrt(scale), 1.0),
            "shared": (2.0, 0.5, scale),
        }[self.s.scale]

    def on_heads(self, q_nope: Tensor, q_pe: Tensor, k: Tensor, pe: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention on expanded keys ``[B, T, H, ·]``; ``[B, S, H, V]`` out."""
        s = self.s
        on_q, on_k, scale = self.scales()
        q_nope, q_pe, k, pe = q_nope * on_q, q_pe * on_q, k * on_k, pe * on_k
        if s.v_padded:
            v = pad(v, [0, s.nope + s.pe - s.v])
        if s.attention == "two_terms":
            scores = torch.einsum("bshd,bthd->bhst", q_nope, k)
            if s.pe:
                scores = scores + torch.einsum("bshd,bthd->bhst", q_pe, pe)
            return torch.einsum("bhst,bthv->bshv", self.weights(scores * scale, mask), v)[..., : s.v]
        parts = ((q_nope, q_pe), (k, pe)) if s.order == "nope_rope" else ((q_pe, q_nope), (pe, k))
        return self.attend(torch.cat(parts[0], -1), torch.cat(parts[1], -1), v, mask, scale)[..., : s.v]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
        """Attention over ``[B, ·, H, ·]`` operands; ``[B, S, H, V]`` out."""
        s = self.s
        scale = 1 / math.sqrt(s.nope + s.pe) if scale is None else scale
        b, n, h, _ = q.shape
        if s.attention == "bshd":
            scores = torch.einsum("bshd,bthd->bsht", q, k) * scale
            p = self.weights(scores, None if mask is None else mask.transpose(1, 2), heads=2)
            return torch.einsum("bsht,bthv->bshv", p, v)
        if s.attention == "einsum":
            p = self.weights(torch.einsum("bshd,bthd->bhst", q * scale, k), mask)
            return torch.einsum("bhst,bthv->bshv", p, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if s.attention == "sdpa":
            causal, shared = s.mask == "causal", k.shape[1] != h
            out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=shared)
        elif s.attention == "merged":
            q, k, v = (x.expand(-1, h, -1, -1).reshape(b * h, x.shape[2], x.shape[3]) for x in (q, k, v))
            room = q.new_empty(b * h, n, k.shape[1])
            scores = torch.baddbmm(room, q, k.transpose(1, 2), beta=0, alpha=scale).view(b, h, n, -1)
            p = self.weights(scores, mask).view(b * h, n, -1)
            out = torch.bmm(p, v).view(b, h, n, -1)
        elif s.attention == "keys_left":
            scores = (k @ q.transpose(2, 3)) * scale
            p = self.weights(scores.transpose(2, 3), mask).transpose(2, 3)
            out = (v.transpose(2, 3) @ p).transpose(2, 3)
        else:
            out = self.weights(q @ k.transpose(2, 3) * scale, mask) @ v
        return out.transpose(1, 2)

    def on_latent(self, q_nope: Tensor, q_pe: Tensor, c: Tensor, pe: Tensor, mask: Tensor | None) -> Tensor:
        """Attention on the latent itself, with both up-projections outside."""
        s = self.s
        on_q, _, scale = self.scales()
        q = torch.einsum("bshn,hnr->bshr", q_nope, self.w[:, : s.nope]) * on_q
        q_pe = q_pe * on_q
        if s.attention in ("bshd", "two_terms", "einsum"):
            scores = torch.einsum("bshr,btr->bsht", q, c)
            if s.pe:
                scores = scores + torch.einsum("bshp,btp->bsht", q_pe, pe)
            p = self.weights(scores * scale, None if mask is None else mask.transpose(1, 2), heads=2)
            out = torch.einsum("bsht,btr->bshr", p, c)
        else:
            parts = ((q, q_pe), (c, pe)) if s.order == "nope_rope" else ((q_pe, q), (pe, c))
            keys = torch.cat(parts[1], -1)
            first = 0 if s.order == "nope_rope" else s.pe
            values = keys[..., first : first + s.rank] if s.cache != "apart" else c
            out = self.attend(torch.cat(parts[0], -1), keys[:, :, None], values[:, :, None], mask, scale)
        return torch.einsum("bshr,hvr->bshv", out, self.w[:, s.nope :])

    def weights(self, scores: Tensor, mask: Tensor | None, heads: int = 1) -> Tensor:
        """Softmax in float32 (or wider), under a mask, beside a sink."""
        s = self.s
        if s.near == "capped scores":
            scores = torch.tanh(scores)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
        if s.sink:
            shape = [1, 1, 1, 1]
            shape[heads] = s.heads
            scores = torch.cat((scores, self.sinks.view(shape).expand(*scores.shape[:-1], 1)), -1)
        if s.attention == "exponentials":
            grown = (scores - scores.amax(-1, keepdim=True)).exp()
            p = grown / grown.sum(-1, keepdim=True)
        else:
            p = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(scores.dtype)
        return p[..., :-1] if s.sink else p


def _extra(s: Spelling, context: int) -> dict[str, Tensor]:
    """Weights that only near misses have."""
    return {
        "pe": torch.randn(s.pe, s.heads * s.pe),
        "head_factor": torch.rand(s.heads) + 0.5,
        "maker": torch.randn(s.hidden, s.heads * s.nope * s.rank) / s.hidden,
        "positions": torch.randn(context, s.heads, s.nope),
        "other": torch.randn(s.hidden, s.rank),
    }


def near_latents(
    m: Attention, x: Tensor, c: Tensor, pe: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The step of a near miss before the up-projections."""
    if m.s.near == "queries, keys and values of one tensor":
        c = x
    if m.s.near == "a mask of every head" and mask is not None:
        t = torch.arange(mask.shape[-1], device=x.device)
        per_head = t != torch.arange(m.s.heads, device=x.device).view(1, -1, 1, 1) + 4  # never all that is visible
        mask = mask & per_head if mask.dtype is torch.bool else mask + per_head.to(mask.dtype)
    return c, pe, mask


def near_keys(m: Attention, x: Tensor, c: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The step of a near miss behind the up-projections: keys, values and rotary keys of every head."""
    s, near = m.s, m.s.near
    b, t = k.shape[:2]
    if near == "rope keys of every head":
        own = (pe[:, :, 0] @ m.extra["pe"]).view(b, t, s.heads, s.pe).transpose(1, 2)
        pe = turn(own, torch.arange(t, device=x.device) + x.shape[1], s.rope).transpose(1, 2)
    elif near == "rope keys scaled by head":
        pe = pe * m.extra["head_factor"][:, None]
    elif near == "a nonlinearity behind the projection":
        k = torch.nn.functional.silu(k)
    elif near == "keys normalized head by head":
        k = torch.nn.functional.normalize(k, dim=-1)
    elif near == "values of another latent":
        _, v = m.expand(torch.relu(x @ m.extra["other"]))
    elif near == "a weight that the input makes":
        w = (x.mean((0, 1)) @ m.extra["maker"]).view(s.heads, s.nope, s.rank)
        k = torch.einsum("btr,hnr->bthn", c, w)
    elif near == "a table of positions on the keys":
        k = k + m.extra["positions"][:t]
    elif near == "grouped key heads over a latent":
        k, v = (y.repeat_interleave(2, 2) for y in (k, v))
    elif near == "grouped-query attention":
        k, v, pe = (y[:, :, ::2] for y in (k, v, pe))
    elif near == "keys of every head cached":
        k, v = (torch.cat((torch.zeros_like(y[:, :1]), y[:, 1:]), 1) for y in (k, v))
    elif near == "one key and one value head":
        k, v = (y[:, :, :1].expand(-1, -1, s.heads, -1) for y in (k, v))
    return k, v, pe
