"""A cache that is handed expanded keys and values stores their latents: where the graph shows what those are.

    before   c_kv, k_pe = latent_of(k, v);  store(c_kv, k_pe);  k, v = expanded_again(read(), k, v)
    after    store(the latents that k and v were expanded from);  k, v = the same expansion of what is read

Then the graph is one that caches latents, and is recognised and absorbed like any other.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from mlacompile.errors import CacheError
from mlacompile.ops import latents as _ops  # noqa: F401  (registers the ops that are looked for)
from mlacompile.passes.axes import BATCH, HEAD, TOKEN, Atom, Dims, shape_of, shape_with
from mlacompile.passes.cone import Cone, WalkError, walk
from mlacompile.passes.emit import Emitter
from mlacompile.passes.maps import Probe
from mlacompile.passes.probe import probe
from mlacompile.passes.replay import replay
from mlacompile.passes.source import source_of

aten = torch.ops.aten
_LATENT_OF = torch.ops.mlacompile.latent_of.default
_EXPANDED_AGAIN = torch.ops.mlacompile.expanded_again.default


def keep_latents(graph: Graph, dynamic: set[Node]) -> int:
    """Replace both ops everywhere, in place; returns how many caches store latents now.

    Args:
        dynamic: nodes that depend on more than weights.
    Raises:
        CacheError: keys and values are not what a latent expands to, or not to one of that size; with the reason.
    """
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=_LATENT_OF)):
        _keep(node, dynamic)
        count += 1
    return count


def _keep(node: Node, dynamic: set[Node]) -> None:
    k, v, rank, rope = node.args[:4]
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    try:
        cone = walk([(k, _axes(k)), (v, _axes(v))], dynamic)
        found = probe(cone, k, v)
    except WalkError as error:
        raise _no_latents(node, str(error)) from error
    cone = cone.regrouped(found.parts) if found.parts else cone
    widths = cone.latents[found.c_kv].width, 0 if found.k_pe is None else cone.latents[found.k_pe].width
    if widths != (rank, rope):
        raise _no_latents(node, f"they come from {widths[0]} and {widths[1]} values a token, not {rank} and {rope}")
    parts = {n.args[1]: n for n in node.users if n.target is operator.getitem}
    emit = Emitter(node)
    emit.known = {BATCH: emit.size(k, 0)}
    for which, number in enumerate((found.c_kv, found.k_pe)):
        if which in parts and number is not None:
            latent = cone.latents[number]
            whole = emit.arrange(latent.node, cone.dims[latent.node], "BTD")
            parts[which].replace_all_uses_with(emit.narrow(whole, 2, latent.start, latent.width))
    for again in list(node.graph.find_nodes(op="call_function", target=_EXPANDED_AGAIN)):
        if again.args[2] is k and again.args[3] is v:
            _expand(again, cone, found)


def _axes(node: Node) -> Dims:
    """Axes of keys or values; one new token is an axis as well, unlike elsewhere."""
    shape = shape_of(node) or ()
    names = (BATCH, HEAD, TOKEN, "D")
    return tuple(
        () if size == 1 and name != TOKEN else (Atom(name, size),) for size, name in zip(shape, names, strict=True)
    )


def _expand(node: Node, cone: Cone, found: Probe) -> None:
    """The cone once more, on what is read from the cache."""
    c_kv, k_pe, k, v = node.args
    assert isinstance(c_kv, Node)
    assert isinstance(k_pe, Node)
    batch, tokens = (c_kv.meta["val"].shape[i] for i in (0, 1))
    if not isinstance(batch, int) or not isinstance(tokens, int):
        raise _no_latents(node, "the batch or the size of the cache is symbolic; mark both as static")
    emit = Emitter(node)
    given = {found.c_kv: c_kv, found.k_pe: k_pe}
    feeds: dict[Node, Any] = {weight: weight for weight in cone.weights}
    for leaf in cone.latent_nodes():
        numbers = [i for i, latent in enumerate(cone.latents) if latent.node is leaf and latent.width]
        parts = [given[i] if i in given else _zeros(emit, c_kv, cone.latents[i].width) for i in numbers]
        whole = parts[0] if len(parts) == 1 else emit(aten.cat.default, parts, 2)
        feeds[leaf] = _placed(emit, whole, cone.dims[leaf], batch, tokens)
    env = replay(cone, feeds, batch, tokens, emit, casts=True)
    for part in list(node.users):
        part.replace_all_uses_with(env[k if part.args[1] == 0 else v])  # type: ignore[index]


def _placed(emit: Emitter, x: Node, dims: Dims, batch: int, tokens: int) -> Node:
    """``[B, T, features]`` laid out as a leaf with these axes has it."""
    atoms = [a for d in dims for a in d]
    split = emit.view(x, [batch, tokens, *(int(a.size) for a in atoms if not a.resizable)])
    numbers = iter(range(2, 2 + len(atoms)))
    order = [0 if a.label == BATCH else 1 if a.label == TOKEN else next(numbers) for a in atoms]
    order += [i for i in (0, 1) if i not in order]  # a batch of one
    return emit.view(emit.permute(split, order), [int(s) for s in shape_with(dims, batch, tokens)])


def _zeros(emit: Emitter, like: Node, width: int) -> Node:
    value = like.meta["val"]
    shape = [*value.shape[:2], width]
    return emit(aten.full.default, shape, 0.0, dtype=value.dtype, device=value.device)


def _no_latents(node: Node, reason: str) -> CacheError:
    return CacheError(
        f"a LatentCache was handed keys and values of every head at {source_of(node)}, and the latents behind them "
        f"cannot be told: {reason}. Use StaticCache for this model."
    )
