"""Ask a cone what it computes, instead of reading how it is spelled.

The cone is evaluated on three kinds of tokens and weights, in float64:

1. weights of ones, one-hot latents: which latent value reaches which head and row, with what factor;
2. weights that hold their own element numbers: which element of which weight does it (see ``views.py``);
3. random everything: the answer read off 1 and 2 must reproduce K and V exactly, or the site is refused.

A rotary key reaches K with no weight at all; the latent reaches K and V through one element of one weight each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from mlacompile.passes.axes import FEATURE, TOKEN, Dims, labels
from mlacompile.passes.cone import Cone, WalkError
from mlacompile.passes.source import describe
from mlacompile.passes.views import View, find_view

#: Float64 arithmetic on sums of at most a few thousand terms: what rounding alone may leave between two orders of
#: summation.
EXACT = 1e-10
_ALL_BELOW = 160  # latents up to this width are probed in every element, wider ones in a sample


@dataclass(frozen=True)
class WeightView:
    """``scale`` times a view of the ``leaf``-th weight of a cone."""

    leaf: int
    view: View
    scale: float


@dataclass(frozen=True)
class Probe:
    """What K and V are: indices into the cone's latents and weights, row ranges, and views.

    c_kv: which latent holds the compressed keys and values. k_pe: which one the rotary key, or None.
    k_rows, pe_rows, v_rows: (start, length) of the rows of K that come from the latent, from the rotary key, and of V.
    w_uk ``[H, N, R]``, w_uv ``[H, V, R]``: views of weights. v_bias ``[H, V]``: a bias on V, or None (one on K
    shifts all scores of a query alike and cancels in the softmax).
    pe_scale: factor on the rotary key.
    """

    c_kv: int
    k_pe: int | None
    k_rows: tuple[int, int]
    pe_rows: tuple[int, int]
    v_rows: tuple[int, int]
    w_uk: WeightView
    w_uv: WeightView
    v_bias: WeightView | None
    pe_scale: float


def feature_width(dims: Dims) -> int:
    """Values a token takes in a tensor with these dims."""
    width = 1
    for dim in dims:
        for atom in dim:
            if not atom.resizable:
                width *= int(atom.size)
    return width


def place(x: torch.Tensor, dims: Dims) -> torch.Tensor:
    """Lay ``x`` ``[batch, tokens, features]`` out the way a leaf with these dims has it."""
    features = [int(a.size) for d in dims for a in d if not a.resizable]
    x = x.reshape(*x.shape[:2], *features)
    axis = {"B": 0, "T": 1}
    atoms = [a for d in dims for a in d]
    numbers = iter(range(2, 2 + len(features)))
    order = [axis[a.label] if a.resizable else next(numbers) for a in atoms]
    missing = [i for i in (0, 1) if i not in order]
    x = x.permute(missing + order).reshape([x.shape[i] for i in missing] + [x.shape[i] for i in order])
    for _ in missing:
        x = x[0]
    grouped = iter(x.shape)
    shape = []
    for dim in dims:
        size = 1
        for _ in dim:
            size *= next(grouped)
        shape.append(size)
    return x.reshape(shape)


class _Prober:
    """Evaluates one cone on chosen tokens and weights."""

    def __init__(self, cone: Cone, k: Node, v: Node) -> None:
        self.cone, self.k, self.v = cone, k, v
        self.widths = [feature_width(cone.dims[n]) for n in cone.latents]
        self.weight_shapes = [cone.feed_shape(n, 1, 1) for n in cone.weights]
        self.offsets = [1]
        for shape in self.weight_shapes:
            self.offsets.append(self.offsets[-1] + _numel(shape))

    def __call__(self, latents: list[torch.Tensor], weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as ``[batch, H, tokens, rows]`` for latents ``[batch, tokens, width]`` and weights."""
        batch, tokens = latents[0].shape[:2]
        feeds = {n: place(x, self.cone.dims[n]) for n, x in zip(self.cone.latents, latents, strict=True)}
        feeds |= dict(zip(self.cone.weights, weights, strict=True))
        try:
            env = self.cone.evaluate(feeds, batch, tokens)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise WalkError(f"the way from the latent to K or V could not be evaluated on its own: {error}") from error
        return env[self.k], env[self.v]

    def ones(self) -> list[torch.Tensor]:
        return [torch.ones(s, dtype=torch.float64) for s in self.weight_shapes]

    def ids(self) -> list[torch.Tensor]:
        return [
            torch.arange(o, o + _numel(s), dtype=torch.float64).reshape(s)
            for o, s in zip(self.offsets, self.weight_shapes, strict=False)
        ]

    def random(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0x31A)
        return [torch.randn(s, dtype=torch.float64, generator=generator) for s in self.weight_shapes]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def probe(cone: Cone, k: Node, v: Node) -> Probe:
    """Learn what K and V are made of.

    Raises:
        WalkError: with the reason why this is not latent attention with plain up-projections.
    """
    _check_leaves(cone)
    with unset_fake_temporarily(), torch.no_grad():
        return _probe(_Prober(cone, k, v))


def _probe(prober: _Prober) -> Probe:
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
    if not cone.latents:
        raise WalkError("keys and values do not depend on any token")
    for node in cone.latents:
        if TOKEN not in labels(cone.dims[node]):
            raise WalkError(f"an up-projection weight depends on the input ({describe(node)})")
    for node in cone.weights:
        if {"B", "T"} & labels(cone.dims[node]):
            raise WalkError(f"keys or values mix in a table of positions ({describe(node)})")
    if len(cone.latents) > 2:
        raise WalkError(
            f"keys and values are made of {len(cone.latents)} different latents "
            f"({', '.join(describe(n) for n in cone.latents[:4])}); one latent and one rotary key were expected"
        )
    if not cone.weights:
        raise WalkError("keys and values are shared by all heads and not projected: nothing to absorb")


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

    def weighted(self, i: int) -> bool:
        """Whether latent ``i`` arrives through a weight."""
        return bool((self.factors[i] != 0).any()) and not torch.equal(self.factors[i], self.numbers[i])

    def plain(self, i: int) -> bool:
        """Whether latent ``i`` arrives as it is, through no weight."""
        return bool((self.factors[i] != 0).any()) and torch.equal(self.factors[i], self.numbers[i])


def _interpret(prober: _Prober, k: _Part, v: _Part, picks: list[torch.Tensor]) -> Probe:
    latents = range(len(picks))
    sources = [i for i in latents if v.weighted(i)]
    if any(v.plain(i) for i in latents):
        raise WalkError(
            "values contain cached values that no weight projects: already absorbed, or not latent attention"
        )
    if len(sources) != 1:
        raise WalkError(f"values are made of {len(sources)} latents; exactly one was expected")
    c_kv = sources[0]
    others = [i for i in latents if i != c_kv and bool((k.factors[i] != 0).any())]
    if any(k.weighted(i) for i in others):
        raise WalkError("keys and values are projected from two different latents")
    if k.plain(c_kv):
        raise WalkError("keys contain the latent unprojected: already absorbed, or not latent attention")
    if not k.weighted(c_kv):
        raise WalkError("keys do not depend on the latent that values come from")
    k_pe = others[0] if others else None
    k_rows, w_uk = _weight(prober, k.factors[c_kv], k.numbers[c_kv], picks[c_kv], c_kv, "key")
    v_rows, w_uv = _weight(prober, v.factors[c_kv], v.numbers[c_kv], picks[c_kv], c_kv, "value")
    pe_rows, pe_scale = ((0, 0), 1.0) if k_pe is None else _rope_rows(k.factors[k_pe], picks[k_pe], prober.widths[k_pe])
    return Probe(c_kv, k_pe, k_rows, pe_rows, v_rows, w_uk, w_uv, _bias(prober, v, v_rows), pe_scale)


def _rows(factors: torch.Tensor, what: str) -> tuple[int, int]:
    """The contiguous range of rows that any head or element reaches."""
    used = (factors != 0).flatten(2).any(2).any(0).nonzero().flatten()
    start, stop = int(used[0]), int(used[-1]) + 1
    if len(used) != stop - start:
        raise WalkError(f"the {what} rows that come from the latent are not contiguous")
    return start, stop - start


def _weight(
    prober: _Prober, factors: torch.Tensor, numbers: torch.Tensor, pick: torch.Tensor, latent: int, what: str
) -> tuple[tuple[int, int], WeightView]:
    start, length = _rows(factors, what)
    factors, numbers = factors[:, start : start + length], numbers[:, start : start + length]
    scale = float(factors[0, 0, 0])
    if scale == 0 or not torch.allclose(factors, torch.full_like(factors, scale), rtol=EXACT, atol=0):
        raise WalkError(f"the {what} up-projection is not one weight times one factor")
    view = _decode(prober, numbers / scale, pick, prober.widths[latent], what)
    return (start, length), WeightView(view[0], view[1], scale)


def _decode(prober: _Prober, numbers: torch.Tensor, pick: torch.Tensor, width: int, what: str) -> tuple[int, View]:
    """Element numbers ``[H, rows, picked]`` as a view ``[H, rows, width]`` of one weight."""
    whole = numbers.round()
    if not torch.allclose(numbers, whole, rtol=EXACT, atol=1e-6):
        raise WalkError(f"the {what} up-projection is a product of several weights, not a view of one")
    whole = whole.long()
    leaf = int(torch.searchsorted(torch.tensor(prober.offsets), whole[0, 0, 0], right=True)) - 1
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
        distinct = len(torch.unique(local[:, 0, 0]))
        raise WalkError(
            f"{local.shape[0]} heads share {distinct} {what} up-projections: grouped key heads over a latent"
            if distinct < local.shape[0]
            else f"the {what} up-projection is not one weight with its heads at equal distances: a product of several "
            "weights, or heads out of order"
        )
    axes = [(local.shape[0], h), (local.shape[1], n), (width, r)]
    view = find_view(prober.weight_shapes[leaf], first, axes)
    if view is None:
        raise WalkError(f"the {what} up-projection is not a strided view of its weight")
    return leaf, view


def _rope_rows(factors: torch.Tensor, pick: torch.Tensor, width: int) -> tuple[tuple[int, int], float]:
    """Rows of K that the rotary key fills, in order, the same for every head. Lanes not picked are confirmed later."""
    if not torch.equal(factors, factors[:1].expand_as(factors)):
        raise WalkError("the rotary key differs from head to head")
    rows = (factors[0] != 0).int().argmax(0)
    start, scale = int(rows[0] - pick[0]), float(factors[0, rows[0], 0])
    inside = 0 <= start <= factors.shape[1] - width
    expected = torch.zeros_like(factors[0])
    if inside:
        expected[start + pick, torch.arange(len(pick))] = scale
    if not inside or not torch.equal(factors[0], expected):
        raise WalkError("the rotary key is reordered or mixed on its way into K")
    return (start, width), scale


def _bias(prober: _Prober, v: _Part, rows: tuple[int, int]) -> WeightView | None:
    ones, ids = (b for b in v.bias)
    if not (ones != 0).any():
        return None
    start, length = rows
    inside = ones[:, start : start + length]
    if (ones != 0).sum() != inside.numel() or not torch.allclose(inside, inside[:1, :1].expand_as(inside), rtol=EXACT):
        raise WalkError("values carry an offset that is not one bias a head and row")
    scale = float(inside[0, 0])
    numbers = (ids[:, start : start + length] / scale)[:, :, None]
    leaf, view = _decode(prober, numbers, torch.zeros(1, dtype=torch.long), 1, "value bias")
    return WeightView(leaf, view, scale)


def _confirm(prober: _Prober, found: Probe) -> None:
    """The decisive test: on random latents and weights, what was read off must give K and V again."""
    generator = torch.Generator().manual_seed(0xC0FFEE)
    batched = any("B" in labels(prober.cone.dims[n]) for n in prober.cone.latents)
    shape = (2 if batched else 1, 3)
    latents = [torch.randn(*shape, w, dtype=torch.float64, generator=generator) for w in prober.widths]
    weights = prober.random()
    k, v = prober(latents, weights)
    zero_k, _ = prober([torch.zeros_like(x) for x in latents], weights)
    k_want, v_want = torch.zeros_like(k), torch.zeros_like(v)
    c_kv = latents[found.c_kv]
    _put(k_want, found.k_rows, torch.einsum("btr,hnr->bhtn", c_kv, weight_of(found.w_uk, weights)))
    _put(v_want, found.v_rows, torch.einsum("btr,hnr->bhtn", c_kv, weight_of(found.w_uv, weights)))
    if found.k_pe is not None:
        _put(k_want, found.pe_rows, found.pe_scale * latents[found.k_pe][:, None].expand(-1, k.shape[1], -1, -1))
    if found.v_bias is not None:
        _put(v_want, found.v_rows, weight_of(found.v_bias, weights)[None, :, None, :, 0])
    for got, want in ((k_want + zero_k, k), (v_want, v)):
        if not bool((got - want).abs().max() <= EXACT * (1 + want.abs().max())):
            raise WalkError(
                "keys or values are not linear in the latent: a nonlinearity, or two weights multiplied, lies between"
            )


def weight_of(found: WeightView, weights: list[torch.Tensor]) -> torch.Tensor:
    """The view of the weight, with its factor."""
    return found.scale * found.view.apply(weights[found.leaf])


def _put(x: torch.Tensor, rows: tuple[int, int], value: torch.Tensor) -> None:
    x[..., rows[0] : rows[0] + rows[1]] += value


__all__ = ["EXACT", "FEATURE", "Probe", "WeightView", "feature_width", "place", "probe", "weight_of"]
