"""Ask a cone what it computes, instead of reading how it is spelled.

The cone is evaluated on three kinds of tokens and weights, in float64:

1. weights of ones, one-hot latents: which latent value reaches which head and row, with what factor;
2. weights that hold their own element numbers: which element of which weight does it (see ``views.py``);
3. random everything: the answer read off 1 and 2 (``maps.py``) must reproduce K and V exactly, or the site is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from mlacompile.passes.axes import TOKEN, labels
from mlacompile.passes.cone import Cone, WalkError
from mlacompile.passes.maps import Computed, Plain, Probe, UpProjection, WeightView
from mlacompile.passes.prober import Maps, Prober
from mlacompile.passes.source import describe
from mlacompile.passes.views import View, find_view

#: Float64 arithmetic on sums of at most a few thousand terms: what rounding alone may leave between two orders of
#: summation.
EXACT = 1e-10
_ALL_BELOW = 160  # latents up to this width are probed in every element, wider ones in a sample


class _InParts(Exception):
    """The rotary key arrives in several parts of one tensor, which count as one latent."""

    def __init__(self, parts: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.parts = parts


def probe(cone: Cone, k: Node, v: Node) -> Probe:
    """Learn what K and V are made of.

    Raises:
        WalkError: with the reason why this is not latent attention.
    """
    _check_leaves(cone)
    with unset_fake_temporarily(), torch.no_grad():
        try:
            return _probe(Prober(cone, k, v))
        except _InParts as found:
            return replace(_probe(Prober(cone.regrouped(found.parts), k, v)), parts=found.parts)


def _probe(prober: Prober) -> Probe:
    picks = [_picked(width) for width in prober.widths]
    tokens = 1 + sum(len(p) for p in picks)
    latents, starts, at = [], [], 1
    for width, pick in zip(prober.widths, picks, strict=True):
        x = torch.zeros(1, tokens, width, dtype=torch.float64)
        x[0, torch.arange(at, at + len(pick)), pick] = 1.0
        latents.append(x)
        starts.append(at)
        at += len(pick)
    ones, ids = prober(latents, prober.ones()), prober(latents, prober.ids())
    parts = [_Part.read(ones[i][0], ids[i][0], starts, picks) for i in (0, 1)]
    found = _interpret(prober, parts[0], parts[1], picks)
    _confirm(prober, found)
    return found


def _check_leaves(cone: Cone) -> None:
    nodes = cone.latent_nodes()
    if not nodes:
        raise WalkError("keys and values do not depend on any token")
    for node in nodes:
        if TOKEN not in labels(cone.dims[node]):
            raise WalkError(f"an up-projection weight depends on the input ({describe(node)})")
    for node in cone.weights:
        if {"B", "T"} & labels(cone.dims[node]):
            raise WalkError(f"keys or values mix in a table of positions ({describe(node)})")
    if len(nodes) > 2:
        raise WalkError(
            f"keys and values are made of {len(nodes)} different latents "
            f"({', '.join(describe(n) for n in nodes[:4])}); one latent and one rotary key were expected"
        )


def _picked(width: int) -> torch.Tensor:
    if width <= _ALL_BELOW:
        return torch.arange(width)
    generator = torch.Generator().manual_seed(width)
    sample = torch.randperm(width, generator=generator)[:12]
    return torch.unique(torch.cat([torch.tensor([0, 1, 2, width // 2, width - 1]), sample]))


@dataclass
class _Part:
    """K or V read token by token: bias ``[H, rows]``, and for each latent factors and element numbers ``[H, rows,
    picked]``."""

    bias: tuple[torch.Tensor, torch.Tensor]
    factors: list[torch.Tensor]
    numbers: list[torch.Tensor]

    @classmethod
    def read(cls, ones: torch.Tensor, ids: torch.Tensor, starts: list[int], picks: list[torch.Tensor]) -> _Part:
        if not (torch.isfinite(ones).all() and torch.isfinite(ids).all()):
            raise WalkError("part of K or V is never written, or is not finite for finite weights")
        factors, numbers = [], []
        for start, pick in zip(starts, picks, strict=True):
            factors.append((ones[:, start : start + len(pick)] - ones[:, :1]).transpose(1, 2))
            numbers.append((ids[:, start : start + len(pick)] - ids[:, :1]).transpose(1, 2))
        return cls((ones[:, 0], ids[:, 0]), factors, numbers)

    def used(self, i: int) -> bool:
        """Whether latent ``i`` arrives at all."""
        return bool((self.factors[i] != 0).any() or (self.numbers[i] != 0).any())

    def plain(self, i: int) -> bool:
        """Whether latent ``i`` arrives as it is, through no weight."""
        return self.used(i) and torch.equal(self.factors[i], self.numbers[i])

    def weighted(self, i: int) -> bool:
        """Whether latent ``i`` arrives through a weight."""
        return self.used(i) and not self.plain(i)


def _interpret(prober: Prober, k: _Part, v: _Part, picks: list[torch.Tensor]) -> Probe:
    latents = range(len(picks))
    sources = [i for i in latents if v.used(i)]
    if len(sources) != 1:
        raise WalkError(f"values are made of {len(sources)} latents; exactly one was expected")
    c_kv = sources[0]
    others = [i for i in latents if i != c_kv and k.used(i)]
    if len(others) > 1 and _neighbours(prober.cone, others):
        raise _InParts(tuple(tuple(others) if i == others[0] else (i,) for i in latents if i not in others[1:]))
    if any(k.weighted(i) for i in others) or len(others) > 1:
        raise WalkError("keys and values are projected from two different latents")
    if not k.used(c_kv):
        shared = v.plain(c_kv) and all(k.plain(i) for i in others)
        raise WalkError(
            "all heads share one key and one value head that are made of different tensors: multi-query attention has "
            "no latent"
            if shared
            else "keys do not depend on the latent that values come from"
        )
    k_pe = others[0] if others else None
    k_rows, w_uk = _up_projection(prober, k, c_kv, picks[c_kv], "key")
    v_rows, w_uv = _up_projection(prober, v, c_kv, picks[c_kv], "value")
    no_rope: tuple[tuple[int, int], Plain | Computed] = ((0, 0), Plain(1.0))
    pe_rows, w_pe = no_rope if k_pe is None else _rope_rows(k.factors[k_pe], picks[k_pe], prober.widths[k_pe])
    v_bias, k_bias = _bias(prober, v, v_rows), any(bool((b != 0).any()) for b in k.bias)
    return Probe(c_kv, k_pe, k_rows, pe_rows, v_rows, w_uk, w_uv, v_bias, w_pe, k_bias)


def _neighbours(cone: Cone, numbers: list[int]) -> bool:
    """Whether latents follow each other in one tensor."""
    parts = [cone.latents[i] for i in numbers]
    return all(a.node is b.node and a.start + a.width == b.start for a, b in pairwise(parts))


def _rows(factors: torch.Tensor) -> tuple[int, int]:
    """The range of rows that any head or element reaches."""
    used = (factors != 0).flatten(2).any(2).any(0).nonzero().flatten()
    return int(used[0]), int(used[-1]) + 1 - int(used[0])


def _identity(factors: torch.Tensor, pick: torch.Tensor, width: int) -> tuple[tuple[int, int], Plain] | None:
    """Rows that a latent fills as it is, in order and the same for every head."""
    first = int((factors[0, :, 0] != 0).nonzero().flatten()[:1].sum()) - int(pick[0])
    if first < 0 or first + width > factors.shape[1]:
        return None
    scale = float(factors[0, first + int(pick[0]), 0])
    want = torch.zeros_like(factors)
    want[:, first + pick, torch.arange(len(pick))] = scale
    return ((first, width), Plain(scale)) if scale and torch.equal(want, factors) else None


def _up_projection(
    prober: Prober, part: _Part, latent: int, pick: torch.Tensor, what: str
) -> tuple[tuple[int, int], UpProjection]:
    """Which rows come from a latent, and how: as it is, through a view of one weight, or through anything linear."""
    factors, numbers = part.factors[latent], part.numbers[latent]
    if part.plain(latent):
        plain = _identity(factors, pick, prober.widths[latent])
        if plain is None:
            raise WalkError(f"the latent is cut, reordered or mixed on its way into the {what}s")
        return plain
    start, length = rows = _rows(torch.maximum(factors.abs(), numbers.abs()))
    inner = factors[:, start : start + length], numbers[:, start : start + length]
    scale = float(inner[0][0, 0, 0])
    if scale != 0 and torch.allclose(inner[0], torch.full_like(inner[0], scale), rtol=EXACT, atol=0):
        view = _decode(prober, inner[1] / scale, pick, prober.widths[latent], what)
        if view is not None:
            return rows, WeightView(*view, scale)
    maps = prober.units(latent, prober.random())[["key", "value"].index(what)]
    _check_heads_differ(maps, what)
    return rows, Computed(what[0])


def _check_heads_differ(maps: torch.Tensor, what: str) -> None:
    """Maps ``[H, R, rows]`` that repeat are grouped heads."""
    distinct = len(torch.unique(maps.flatten(1), dim=0))
    if distinct < len(maps):
        raise WalkError(f"{len(maps)} heads share {distinct} {what} up-projections: grouped key heads over a latent")


def _decode(
    prober: Prober, numbers: torch.Tensor, pick: torch.Tensor, width: int, what: str
) -> tuple[int, View] | None:
    """Element numbers ``[H, rows, picked]`` as a view ``[H, rows, width]`` of one weight, or None."""
    whole = numbers.round()
    if not torch.allclose(numbers, whole, rtol=EXACT, atol=1e-6):
        return None
    whole = whole.long()
    leaf = int(torch.searchsorted(torch.tensor(prober.offsets), whole[0, 0, 0], right=True)) - 1
    if not 0 <= leaf < len(prober.weight_shapes):
        return None
    local = whole - prober.offsets[leaf]
    h = int(local[1, 0, 0] - local[0, 0, 0]) if local.shape[0] > 1 else 0
    n = int(local[0, 1, 0] - local[0, 0, 0]) if local.shape[1] > 1 else 0
    r = int(local[0, 0, 1] - local[0, 0, 0]) // int(pick[1] - pick[0]) if len(pick) > 1 else 0
    first = int(local[0, 0, 0]) - r * int(pick[0])
    grid = (
        first
        + h * torch.arange(local.shape[0])[:, None, None]
        + n * torch.arange(local.shape[1])[None, :, None]
        + r * pick[None, None, :]
    )
    if not torch.equal(grid, local) or min(h, n, r) < 0 or (h == 0 and local.shape[0] > 1):
        return None
    axes = [(local.shape[0], h), (local.shape[1], n), (width, r)]
    view = find_view(prober.weight_shapes[leaf], first, axes)
    return None if view is None else (leaf, view)


def _rope_rows(factors: torch.Tensor, pick: torch.Tensor, width: int) -> tuple[tuple[int, int], Plain | Computed]:
    """Rows of K that the rotary key fills, the same for every head. Lanes not picked are confirmed later."""
    if not torch.equal(factors, factors[:1].expand_as(factors)):
        raise WalkError("the rotary key differs from head to head")
    return _identity(factors, pick, width) or (_rows(factors), Computed("k", shared=True))


def _bias(prober: Prober, v: _Part, rows: tuple[int, int]) -> WeightView | Computed | None:
    ones, ids = v.bias
    if not (ones != 0).any() and not (ids != 0).any():
        return None
    start, length = rows
    outside = torch.ones_like(ones, dtype=torch.bool)
    outside[:, start : start + length] = False
    if (ones[outside] != 0).any() or (ids[outside] != 0).any():
        raise WalkError("values carry an offset in rows that no latent reaches")
    inside = ones[:, start : start + length]
    scale = float(inside[0, 0])
    if scale != 0 and torch.allclose(inside, inside[:1, :1].expand_as(inside), rtol=EXACT):
        numbers = (ids[:, start : start + length] / scale)[:, :, None]
        view = _decode(prober, numbers, torch.zeros(1, dtype=torch.long), 1, "value bias")
        if view is not None:
            return WeightView(*view, scale)
    return Computed("v")


def _confirm(prober: Prober, found: Probe) -> None:
    """The decisive test: on random latents and weights, what was read off must give K and V again."""
    generator = torch.Generator().manual_seed(0xC0FFEE)
    cone = prober.cone
    batched = any("B" in labels(cone.dims[n]) for n in cone.latent_nodes())
    shape = (2 if batched else 1, 3)
    latents = [torch.randn(*shape, w, dtype=torch.float64, generator=generator) for w in prober.widths]
    weights = prober.random()
    k, v = prober(latents, weights)
    zero_k, _ = prober([torch.zeros_like(x) for x in latents], weights)
    k_want, v_want = torch.zeros_like(k), torch.zeros_like(v)
    c_kv, maps = latents[found.c_kv], Maps(prober, found, weights)
    heads = k.shape[1]
    _put(k_want, found.k_rows, torch.einsum("btr,hnr->bhtn", c_kv, maps.w_uk.expand(heads, -1, -1)))
    _put(v_want, found.v_rows, torch.einsum("btr,hnr->bhtn", c_kv, maps.w_uv.expand(heads, -1, -1)))
    if found.k_pe is not None and maps.w_pe is not None:
        _put(k_want, found.pe_rows, torch.einsum("btp,np->btn", latents[found.k_pe], maps.w_pe[0])[:, None])
    if maps.v_bias is not None:
        _put(v_want, found.v_rows, maps.v_bias[None, :, None])
    for got, want in ((k_want + zero_k, k), (v_want, v)):
        if not bool((got - want).abs().max() <= EXACT * (1 + want.abs().max())):
            raise WalkError(
                "keys or values are not linear in the latent: a nonlinearity, or the latent multiplied by itself, lies "
                "between"
            )


def _put(x: torch.Tensor, rows: tuple[int, int], value: torch.Tensor) -> None:
    x[..., rows[0] : rows[0] + rows[1]] += value
