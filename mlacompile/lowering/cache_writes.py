"""What a decode step does between its projections and attention, in one launch a layer.

    index_copy(cache, slots, packed(rms(latent) · norm))  ┐
    index_copy(cache, slots, packed(rotated(k_pe)))       ├─►  mlacompile::write_latents, which writes where it lies
    mla_decode(…, rotated(q_pe), …)                       ┘

Each of these is a kernel of a microsecond to Inductor, an FP8 cache several. What is not recognised stays as it was:
without a norm latents are written as they are, queries that are turned otherwise than keys are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

import mlacompile.ops.write_latents  # noqa: F401  (registers the op)
from mlacompile.kernels import registry
from mlacompile.lowering.around_row import Norm, norm_before
from mlacompile.lowering.region import fed_by_tokens, random_like, run
from mlacompile.lowering.rotation import Rotation, emit_factors, pairs_of, rotation_before, signature
from mlacompile.lowering.select import decode_nodes
from mlacompile.lowering.stored_token import StoredToken, stored_token
from mlacompile.passes.emit import Emitter

_WRITE_LATENTS = torch.ops.mlacompile.write_latents.default
#: Tokens of a step up to which its launches count for more than its memory.
MOST_TOKENS = 64
#: Float64 arithmetic on a mean of squares.
_EXACT = 1e-10


@dataclass(frozen=True)
class _Site:
    """Everything that one call does. queries: None where they stay as they are."""

    token: StoredToken
    norm: Norm | None
    keys: Rotation | None
    queries: Rotation | None
    pairs: str


def place_cache_writes(gm: GraphModule) -> int:
    """Write such calls into a functional ATen graph, where a kernel takes them; returns how many."""
    placed = 0
    factors: dict[str, Node] = {}
    probed: dict[str, tuple[str, bool]] = {}
    for decode in decode_nodes(gm):
        with unset_fake_temporarily(), torch.no_grad():
            token = stored_token(decode, MOST_TOKENS)
            if token is None or not _is_served(token):
                continue
            site = _site(decode, token, fed_by_tokens(gm.graph), probed)
        if site.keys is not None or token.settings["group"]:
            placed += _place(site, factors)
    return placed


def _is_served(token: StoredToken) -> bool:
    """Whether a kernel takes the write alone: asked first, for all that is to be found out takes longer."""
    b, s, latent, key = token.batch, token.tokens, token.latent.meta["val"], token.key
    rows = latent.reshape(b, s, -1), None if key is None else key.meta["val"].reshape(b, s, -1)
    caches = [None if write is None else write.args[0].meta["val"] for write in token.writes]  # type: ignore[union-attr]
    arguments = (*rows, None, None, None, token.slots.meta["val"], *caches)
    return _kernel(arguments, {**token.settings, "eps": 0.0, "pairs": ""}) is not None


def _kernel(arguments: tuple[Any, ...], settings: dict[str, Any]) -> registry.Kernel | None:
    return next((k for k in registry.kernels("write_latents") if not k.supports(*arguments, **settings)), None)


def _site(decode: Node, token: StoredToken, fed: set[Node], probed: dict[str, tuple[str, bool]]) -> _Site:
    """probed: what was found for other layers, whose rotations mostly are the same."""
    norm = norm_before(token.latent)
    if norm is not None and not _is_norm(norm, token.latent):
        norm = None
    keys = None if token.key is None else rotation_before(token.key, fed)
    if keys is None:
        return _Site(token, norm, None, None, "")
    queries = rotation_before(decode.args[1], fed)  # type: ignore[arg-type]
    name = f"{signature(keys)} {'' if queries is None else signature(queries)}"
    if name not in probed:
        pairs, alike = pairs_of(keys, [] if queries is None else [queries], token.batch, token.tokens)
        probed[name] = pairs, bool(alike)
    pairs, turned = probed[name]
    return _Site(token, norm, keys if pairs else None, queries if turned else None, pairs)


def _is_norm(norm: Norm, out: Node) -> bool:
    """The ops, run on random values, against the formula."""
    generator = torch.Generator().manual_seed(0xC0FFEE)
    x, weight = (random_like(node, generator) for node in (norm.x, norm.weight))
    try:
        got = run(out, {norm.x: x, norm.weight: weight}, casts=False)
    except KeyError:  # made of more than these
        return False
    rows = x.reshape(-1, weight.numel())
    want = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.eps) * weight.reshape(-1)
    return bool((got.reshape(rows.shape) - want).abs().max() <= _EXACT * (1 + want.abs().max()))


def _place(site: _Site, factors: dict[str, Node]) -> int:
    """Write one call into the graph: before the first that reads what it writes, behind all that it reads."""
    token = site.token
    order = {node: i for i, node in enumerate(token.latent.graph.nodes)}
    for queries in dict.fromkeys((site.queries, None)):
        replaced = token.written + ([] if queries is None else [queries.out])
        readers = [user for node in replaced for user in node.users if user not in token.copies]
        if not readers:
            return 0
        anchor = min(readers, key=order.__getitem__)
        needed = {node for node in _needed(site, queries) if order[node] >= order[anchor]}
        if not needed:
            return _write(site, queries, Emitter(anchor), factors)
    return 0


def _needed(site: _Site, queries: Rotation | None) -> set[Node]:
    token = site.token
    needed = {token.slots, token.latent if site.norm is None else site.norm.x}
    needed |= set() if site.norm is None else {site.norm.weight}
    for rotation in (site.keys, queries):
        needed |= set() if rotation is None else {rotation.x, *rotation.tables}
    return needed | ({token.key} if site.keys is None and token.key is not None else set())


def _write(site: _Site, queries: Rotation | None, emit: Emitter, factors: dict[str, Node]) -> int:
    token, norm, keys = site.token, site.norm, site.keys
    b, s = token.batch, token.tokens
    latent, weight = (token.latent, None) if norm is None else (norm.x, norm.weight)
    rank = token.latent.meta["val"].shape[-1]
    key = token.key if keys is None else keys.x
    rotation = None
    if keys is not None:
        name = f"{site.pairs} {signature(keys)}"
        rotation = factors.get(name) or emit_factors(emit, keys, site.pairs, b, s)
    q = None
    if queries is not None:
        q = emit.view(queries.x, list(queries.out.meta["val"].shape))
    arguments: tuple[Any, ...] = (
        emit.view(latent, [b, s, rank]),
        None if key is None else emit.view(key, [b, s, key.meta["val"].shape[-1]]),
        q,
        None if weight is None else emit.view(weight, [rank]),
        rotation,
        token.slots,
        *(None if write is None else write.args[0] for write in token.writes),
    )
    settings = {**token.settings, "eps": 0.0 if norm is None else norm.eps, "pairs": site.pairs}
    values = torch.fx.map_arg(arguments, lambda n: n.meta["val"])
    kernel = _kernel(values, settings)
    if kernel is None:  # what was emitted is dead code
        return 0
    if rotation is not None:
        factors[name] = rotation
    made = emit(_WRITE_LATENTS, *arguments, **settings, impl=kernel.name)
    for copy in token.copies:
        emit.graph.erase_node(copy)
    for write in token.written:
        write.replace_all_uses_with(write.args[0])  # type: ignore[arg-type]
        emit.graph.erase_node(write)
    if queries is not None:
        queries.out.replace_all_uses_with(made)
    return 1
