"""Stage 7: the original and the rewritten subgraph, side by side, before anything runs.

A stand-in of the site is built: the same cone, weights and rewrite, on two sentences of five tokens. Keys and values
come from the
*original* nodes, the rewrite from the same code that rewrote the real graph; both run in float64 on random data. The
tolerance is the rounding bound of the two orders of summation, computed from the absolute values of the very operands.
"""

from __future__ import annotations

import math
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
from mlacompile.passes.cone import Cone
from mlacompile.passes.recognize import MLASite
from mlacompile.passes.replay import evaluate, replay

BATCHES, TOKENS, QUERIES = 2, 5, 3
Rewrite = Callable[[MLASite, Options], Node]
aten = torch.ops.aten


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
class StandIn:
    """Random float64 tensors for one site at small sizes."""

    q: Tensor
    latents: list[Tensor]
    weights: list[Tensor]
    mask: Tensor
    sink: Tensor | None
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, site: MLASite, seed: int) -> StandIn:
        cone = site.cone
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=draw)

        batch = BATCHES if any(BATCH in labels(cone.dims[n]) for n in cone.latent_nodes()) else 1
        latents = [random(batch, TOKENS, latent.width) for latent in cone.latents]
        weights = [_weight(cone.feed_shape(n, 1, 1), draw) for n in cone.weights]
        env = evaluate(cone, cone.feeds(latents, weights), batch, TOKENS)
        mask = torch.rand(batch, 1, QUERIES, TOKENS, generator=draw) < 0.7
        mask[..., 0] = True
        q = random(batch, site.geometry.heads, QUERIES, site.head_size)
        sink = None if site.attention.sink is None else random(batch, site.geometry.heads, QUERIES, 1)
        k, v = (env[n].expand(-1, site.geometry.heads, -1, -1) for n in (site.attention.k, site.attention.v))
        return cls(q, latents, weights, mask, sink, k, v)

    def leaves(self, cone: Cone) -> dict[str, Tensor]:
        """Values of the tensors that latents lie in and of the weights, in the order of the cone."""
        feeds = cone.feeds(self.latents, self.weights)
        nodes = (*cone.latent_nodes(), *cone.weights)
        return {f"leaf{i}": feeds[node].contiguous() for i, node in enumerate(nodes)}


def _weight(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Uniform numbers, which are drawn in a third of the time that normal ones take, that keep what they multiply near
    its size."""
    return torch.rand(shape, dtype=torch.float64, generator=draw).sub_(0.5).mul_((12 / (shape or (1,))[-1]) ** 0.5)


def validate(site: MLASite, options: Options, seed: int = 0, rewrite: Rewrite = absorb) -> Verdict:
    """Compare a site with its rewrite on data drawn with ``seed``."""
    with unset_fake_temporarily(), torch.no_grad():
        return _compare(site, options, StandIn.of(site, seed), rewrite)


def _compare(site: MLASite, options: Options, data: StandIn, rewrite: Rewrite) -> Verdict:
    scores = data.q @ data.k.transpose(2, 3) * site.attention.scale
    scores = scores.masked_fill(~data.mask, float("-inf"))
    scores = scores if data.sink is None else torch.cat((scores, data.sink), -1)
    want = torch.softmax(scores, -1)[..., :TOKENS] @ data.v
    got = _rewritten(site, options, data, rewrite)
    return Verdict(float((got - want).abs().max()), _bound(site, data))


def _rewritten(site: MLASite, options: Options, data: StandIn, rewrite: Rewrite) -> Tensor:
    """Run the rewrite on the stand-in."""
    graph, feeds, op = rewritten_graph(site, options, data, rewrite)
    op.target = mla_prefill_reference if op.target is torch.ops.mlacompile.mla_prefill.default else _reference
    return GraphModule({}, graph)(*feeds.values())  # type: ignore[no-any-return]


def rewritten_graph(
    site: MLASite, options: Options, data: StandIn, rewrite: Rewrite
) -> tuple[Graph, dict[str, Tensor], Node]:
    """The rewrite emitted into a graph of its own; values of the inputs by name; and the op of ours in it."""
    graph = Graph()
    feeds: dict[str, Tensor] = {}

    def placeholder(name: str, value: Tensor) -> Node:
        node = graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        feeds[name] = value
        return node

    mode = FakeTensorMode()
    cone = site.cone
    q = placeholder("q", data.q)
    k, v, mask = placeholder("k", data.k), placeholder("v", data.v), placeholder("mask", data.mask)
    leaves: dict[Node, tuple[Node, Any]] = {}
    sizes = {BATCH: data.q.shape[0], TOKEN: TOKENS}
    for (name, value), node in zip(data.leaves(cone).items(), (*cone.latent_nodes(), *cone.weights), strict=True):
        small = tuple(tuple(replace(a, size=sizes[a.label]) if a.resizable else a for a in d) for d in cone.dims[node])
        leaves[node] = placeholder(name, value), small
    sink = None if data.sink is None else placeholder("sink", data.sink)
    site_attention = replace(site.attention, q=q, mask=mask, causal=False, prefix=None, sink=sink)
    node = graph.call_function(
        torch.ops.mlacompile.attention.default, (q, k, v, mask, False, site_attention.scale, False)
    )
    with mode:
        node.meta["val"] = torch.empty(*data.q.shape[:3], data.v.shape[3], dtype=data.q.dtype)
    graph.output(node)
    stand_in = replace(site, attention=replace(site_attention, node=node), leaves=leaves)
    op = rewrite(stand_in, options)
    op.kwargs = {key: value for key, value in op.kwargs.items() if key != "impl"}
    graph.eliminate_dead_code()
    return graph, feeds, op


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


def _bound(site: MLASite, data: StandIn) -> float:
    """How far two evaluations of the same chain may lie apart for rounding alone.

    A sum of n products errs by at most n·eps times the sum of their absolute values (Higham, Accuracy and Stability,
    3.1). So the chain is run once more on absolute values, with sums in place of differences, and n counts every
    rounding on the way. An error e in every score changes a softmax by at most a factor exp(2e).
    """
    eps = torch.finfo(torch.float64).eps
    cone, found, g = site.cone, site.probe, site.geometry
    latents = [x.abs() for x in data.latents]
    k, v = _magnitudes(site, latents, data)
    if found.computed:  # maps are differences to what the cone makes of zero, one for every value of the latent
        zero = _magnitudes(site, [torch.zeros_like(x) for x in latents], data)
        share = 2 * sum(x.sum(-1).max() for x in latents)
        k, v = k + share * zero[0], v + share * zero[1]
    n = 2 * cone.roundings() + 2 * (g.rank + site.head_size + TOKENS) + 8
    score_error = eps * n * site.attention.scale * float((data.q.abs() @ k.transpose(2, 3)).max())
    return float(v.max()) * (math.expm1(2 * score_error) + eps * n)


def _magnitudes(site: MLASite, latents: list[Tensor], data: StandIn) -> tuple[Tensor, Tensor]:
    """Sums of absolute values behind every element of K and V."""
    cone, batch = site.cone, latents[0].shape[0]
    feeds = cone.feeds(latents, [w.abs() for w in data.weights])
    env = replay(cone, feeds, batch, TOKENS, _absolute)
    k, v = (env[n].abs().expand(-1, site.geometry.heads, -1, -1) for n in (site.attention.k, site.attention.v))
    return k, v


def _absolute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """A linear op on absolute values: what could cancel adds up."""
    if op is aten.neg.default:
        return args[0]
    if op in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.sub.Tensor):
        args = tuple(abs(a) if isinstance(a, (int, float)) else a for a in args)
        kwargs = {name: abs(value) for name, value in kwargs.items()}
    return aten.add.Tensor(*args, **kwargs) if op is aten.sub.Tensor else op(*args, **kwargs)
