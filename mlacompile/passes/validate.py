"""Stage 7: the original and the rewritten subgraph, side by side, before anything runs.

A stand-in of the site is built: the same cone, weights and rewrite, on two sentences of five tokens. Keys and values
come from the
*original* nodes, the rewrite from the same code that rewrote the real graph; both run in float64 on random data. The
tolerance is the rounding bound of the two orders of summation, computed from the absolute values of the very operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node

from mlacompile.ops import mla_decode_reference, mla_prefill_reference
from mlacompile.options import Options
from mlacompile.passes.absorb import absorb
from mlacompile.passes.axes import BATCH, TOKEN, labels
from mlacompile.passes.probe import Maps, Prober
from mlacompile.passes.recognize import MLASite

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
    sink: Tensor | None
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, site: MLASite, seed: int) -> _StandIn:
        cone = site.cone
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=draw)

        batch = BATCHES if any(BATCH in labels(cone.dims[n]) for n in cone.latent_nodes()) else 1
        latents = [random(batch, TOKENS, latent.width) for latent in cone.latents]
        weights = [random(*cone.feed_shape(n, 1, 1)) / cone.feed_shape(n, 1, 1)[-1] ** 0.5 for n in cone.weights]
        env = cone.evaluate(cone.feeds(latents, weights), batch, TOKENS)
        mask = torch.rand(batch, 1, QUERIES, TOKENS, generator=draw) < 0.7
        mask[..., 0] = True
        q = random(batch, site.geometry.heads, QUERIES, site.head_size)
        sink = None if site.attention.sink is None else random(batch, site.geometry.heads, QUERIES, 1)
        k, v = (env[n].expand(-1, site.geometry.heads, -1, -1) for n in (site.attention.k, site.attention.v))
        return cls(q, latents, weights, mask, sink, k, v)


def validate(
    site: MLASite, options: Options, seed: int = 0, rewrite: Callable[[MLASite, Options], Node] = absorb
) -> Verdict:
    """Compare a site with its rewrite on random data."""
    with unset_fake_temporarily(), torch.no_grad():
        return _compare(site, options, _StandIn.of(site, seed), rewrite)


def _compare(site: MLASite, options: Options, data: _StandIn, rewrite: Callable[[MLASite, Options], Node]) -> Verdict:
    scores = data.q @ data.k.transpose(2, 3) * site.attention.scale
    scores = scores.masked_fill(~data.mask, float("-inf"))
    scores = scores if data.sink is None else torch.cat((scores, data.sink), -1)
    want = torch.softmax(scores, -1)[..., :TOKENS] @ data.v
    got = _rewritten(site, options, data, rewrite)
    return Verdict(float((got - want).abs().max()), _bound(site, data))


def _rewritten(site: MLASite, options: Options, data: _StandIn, rewrite: Callable[[MLASite, Options], Node]) -> Tensor:
    """Run the rewrite, emitted into a graph of its own, on the stand-in."""
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
    leaves: dict[Node, tuple[Node, Any]] = {}
    feeding = cone.feeds(data.latents, data.weights)
    sizes = {BATCH: data.q.shape[0], TOKEN: TOKENS}
    for i, node in enumerate((*cone.latent_nodes(), *cone.weights)):
        small = tuple(tuple(replace(a, size=sizes[a.label]) if a.resizable else a for a in d) for d in cone.dims[node])
        leaves[node] = placeholder(f"leaf{i}", feeding[node].contiguous()), small
    sink = None if data.sink is None else placeholder("sink", data.sink)
    site_attention = replace(site.attention, q=q, mask=mask, causal=False, prefix=None, sink=sink)
    node = graph.call_function(
        torch.ops.mlacompile.attention.default, (q, k, v, mask, False, site_attention.scale, False)
    )
    graph.output(node)
    stand_in = replace(site, attention=replace(site_attention, node=node), leaves=leaves)
    op = rewrite(stand_in, options)
    op.kwargs = {key: value for key, value in op.kwargs.items() if key != "impl"}
    prefill = op.target is torch.ops.mlacompile.mla_prefill.default
    op.target = mla_prefill_reference if prefill else _reference
    graph.eliminate_dead_code()
    return GraphModule({}, graph)(*feeds)  # type: ignore[no-any-return]


def _reference(
    q: Tensor, q_pe: Tensor | None, c_kv: Tensor, k_pe: Tensor | None, *args: Any, scale: float, causal: bool
) -> Any:
    """The reference of the op, with the log-sum-exp in float64 too."""
    out, rounded = mla_decode_reference(q, q_pe, c_kv, k_pe, *args, scale=scale, causal=causal)
    scores = torch.einsum("bhsr,btr->bhst", q, c_kv)
    if q_pe is not None and k_pe is not None:
        scores = scores + torch.einsum("bhsp,btp->bhst", q_pe, k_pe)
    lse = (scores * scale).masked_fill(~args[0][:, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.float(), rounded)
    return out, lse


def _bound(site: MLASite, data: _StandIn) -> float:
    """Rounding two evaluations of the same chain may differ by: n·eps per sum of n products, carried through the
    softmax.

    An error e in every score changes the softmax's output by at most a factor exp(2e) (Higham, Accuracy and
    Stability, 3.1).
    """
    eps = torch.finfo(torch.float64).eps
    found, g = site.probe, site.geometry
    c_kv = data.latents[found.c_kv].abs()
    maps = Maps(Prober(site.cone, site.attention.k, site.attention.v), found, data.weights)
    w_uk, w_uv = (w.abs().expand(g.heads, -1, -1) for w in (maps.w_uk, maps.w_uv))
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
