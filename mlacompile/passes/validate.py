"""Stage 7: the original and the rewritten subgraph, side by side, before anything runs.

A stand-in of the site is built: the same cone, weights and rewrite, on two sentences of five tokens. Keys and values
come from the
*original* nodes, the rewrite from the same code that rewrote the real graph; both run in float64 on random data. The
tolerance is the rounding bound of the two orders of summation, computed from the absolute values of the very operands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node

from mlacompile.ops import mla_decode_reference
from mlacompile.options import Options
from mlacompile.passes.absorb import absorb
from mlacompile.passes.axes import BATCH, HEAD, TOKEN, dims_for, labels
from mlacompile.passes.cone import Cone
from mlacompile.passes.probe import feature_width, place, weight_of
from mlacompile.passes.recognize import Attention, MLASite

BATCHES, TOKENS, QUERIES = 2, 5, 3


@dataclass(frozen=True)
class Verdict:
    """Largest difference between original and rewritten output, and what rounding may explain."""

    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the rewrite computes the same function."""
        return self.error <= self.bound


@dataclass
class _StandIn:
    """Random float64 tensors for one site at small sizes."""

    q: Tensor
    latents: list[Tensor]
    weights: list[Tensor]
    mask: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, site: MLASite, seed: int) -> _StandIn:
        cone = site.cone
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=draw)

        batch = BATCHES if any(BATCH in labels(cone.dims[n]) for n in cone.latents) else 1
        latents = [random(batch, TOKENS, feature_width(cone.dims[n])) for n in cone.latents]
        weights = [random(*cone.feed_shape(n, 1, 1)) / cone.feed_shape(n, 1, 1)[-1] ** 0.5 for n in cone.weights]
        feeds = {n: place(x, cone.dims[n]) for n, x in zip(cone.latents, latents, strict=True)}
        feeds |= dict(zip(cone.weights, weights, strict=True))
        env = cone.evaluate(feeds, batch, TOKENS)
        mask = torch.rand(batch, 1, QUERIES, TOKENS, generator=draw) < 0.7
        mask[..., 0] = True
        q = random(batch, site.geometry.heads, QUERIES, site.head_size)
        return cls(q, latents, weights, mask, env[site.attention.k], env[site.attention.v])


def validate(site: MLASite, options: Options, seed: int = 0) -> Verdict:
    """Compare a site with its rewrite on random data."""
    with unset_fake_temporarily(), torch.no_grad():
        return _compare(site, options, _StandIn.of(site, seed))


def _compare(site: MLASite, options: Options, data: _StandIn) -> Verdict:
    scores = data.q @ data.k.transpose(2, 3) * site.attention.scale
    p = torch.softmax(scores.masked_fill(~data.mask, float("-inf")), -1)
    want = p @ data.v
    got = _rewritten(site, options, data)
    return Verdict(float((got - want).abs().max()), _bound(site, data))


def _rewritten(site: MLASite, options: Options, data: _StandIn) -> Tensor:
    """Run the rewrite, emitted by ``absorb`` into a graph of its own, on the stand-in."""
    graph = Graph()
    feeds: list[Tensor] = []

    def placeholder(name: str, value: Tensor) -> Node:
        node = graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        feeds.append(value)
        return node

    mode = FakeTensorMode()
    cone = site.cone
    q = placeholder("q", data.q)
    k, v, mask = placeholder("k", data.k), placeholder("v", data.v), placeholder("mask", data.mask)
    leaves: dict[Node, Node] = {}
    small: dict[Node, Any] = {}
    for i, (node, x) in enumerate(zip(cone.latents, data.latents, strict=True)):
        leaves[node] = placeholder(f"latent{i}", place(x, cone.dims[node]).contiguous())
        sizes = {BATCH: x.shape[0], TOKEN: x.shape[1]}
        small[leaves[node]] = tuple(
            tuple(replace(a, size=sizes[a.label]) if a.resizable else a for a in d) for d in cone.dims[node]
        )
    for i, (node, w) in enumerate(zip(cone.weights, data.weights, strict=True)):
        leaves[node] = placeholder(f"weight{i}", w)
        small[leaves[node]] = dims_for(w.shape, [HEAD] * w.dim())
    site_attention = Attention(k, q, k, v, mask, False, site.attention.scale, False)
    node = graph.call_function(
        torch.ops.mlacompile.attention.default, (q, k, v, mask, False, site_attention.scale, False)
    )
    graph.output(node)
    stand_in = replace(
        site,
        attention=replace(site_attention, node=node),
        cone=Cone(small, [], [leaves[n] for n in cone.latents], [leaves[n] for n in cone.weights]),
    )
    decode = absorb(stand_in, options)
    decode.kwargs = {key: value for key, value in decode.kwargs.items() if key != "impl"}
    decode.target = mla_decode_reference
    graph.eliminate_dead_code()
    return GraphModule({}, graph)(*feeds)  # type: ignore[no-any-return]


def _bound(site: MLASite, data: _StandIn) -> float:
    """Rounding two evaluations of the same chain may differ by: n·eps per sum of n products, carried through the
    softmax.

    An error e in every score changes the softmax's output by at most a factor exp(2e) (Higham, Accuracy and
    Stability, 3.1).
    """
    eps = torch.finfo(torch.float64).eps
    found, g = site.probe, site.geometry
    c_kv = data.latents[found.c_kv].abs()
    w_uk, w_uv = (weight_of(w, data.weights).abs() for w in (found.w_uk, found.w_uv))
    k_abs = torch.zeros_like(data.k)
    k_abs[..., found.k_rows[0] : sum(found.k_rows)] = torch.einsum("btr,hnr->bhtn", c_kv, w_uk)
    k_abs = torch.maximum(k_abs, data.k.abs())
    score_error = (
        eps
        * 2
        * (g.rank + site.head_size + 2)
        * site.attention.scale
        * float((data.q.abs() @ k_abs.transpose(2, 3)).max())
    )
    value = float(torch.einsum("btr,hvr->bhtv", c_kv, w_uv).max() + data.v.abs().max())
    return value * (4 * score_error + eps * 2 * (g.rank + TOKENS + 8))
