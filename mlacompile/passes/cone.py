"""What K and V are made of: walk back from them to latents and weights.

The walk ends where a value no longer has heads (a *latent*), at values that depend on parameters alone (*weights*),
and at
whatever is not linear. It knows no names. The part in between, the cone, acts on every cached token alike, so it can be
evaluated on one sentence of two tokens as well as on 64 of 8192 (``replay.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from mlacompile.passes.axes import (
    CONSTANT,
    HEAD,
    Dims,
    Pulled,
    labels,
    shape_of,
    shape_with,
    without_ones,
)
from mlacompile.passes.pull import LINEAR, REARRANGE, pull
from mlacompile.passes.source import describe

aten = torch.ops.aten

#: What a value without heads may be followed through when two leaves turn out to share it.
_CUTS = REARRANGE | {t: LINEAR[t] for t in (aten.slice.Tensor, operator.getitem, aten.cat.default)}
_WEIGHT_OPS = REARRANGE | {
    t: LINEAR[t] for t in (aten.expand.default, aten.slice.Tensor, aten.select.int, operator.getitem)
}


_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}
_STACKS = {aten.stack.default, aten.cat.default}


class WalkError(Exception):
    """The walk met something that is not latent attention; the message is a reason a user can read."""


class HeadedLeaf(WalkError):
    """Keys or values of every head come out of something that is not linear."""

    def __init__(self, node: Node, dims: Dims) -> None:
        super().__init__(_headed_leaf(node))
        self.node, self.dims = node, dims


def dynamic_nodes(graph: Graph, weights: set[Node]) -> set[Node]:
    """Nodes whose value depends on anything but the given weight placeholders: on tokens, positions or the cache."""
    dynamic: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node not in weights and shape_of(node) is not None:
                dynamic.add(node)
        elif any(arg in dynamic for arg in node.all_input_nodes):
            dynamic.add(node)
    return dynamic


@dataclass(frozen=True)
class Latent:
    """Features ``start`` to ``start + width`` of a tensor that has batch and tokens but no heads."""

    node: Node
    start: int
    width: int


@dataclass
class Cone:
    """The part of a graph between K and V and the latents and weights they are made of."""

    dims: dict[Node, Dims] = field(default_factory=dict)
    order: list[Node] = field(default_factory=list)
    latents: list[Latent] = field(default_factory=list)
    weights: list[Node] = field(default_factory=list)

    def regrouped(self, parts: Sequence[Sequence[int]]) -> Cone:
        """The same cone with neighbouring latents of one tensor, given by their numbers, taken as one."""
        groups = [[self.latents[i] for i in part] for part in parts]
        return replace(self, latents=[Latent(g[0].node, g[0].start, sum(x.width for x in g)) for g in groups])

    def latent_nodes(self) -> list[Node]:
        """The tensors that the latents lie in, each once."""
        return list(dict.fromkeys(latent.node for latent in self.latents))

    def feeds(self, latents: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> dict[Node, torch.Tensor]:
        """Values of the leaves: latents given as ``[batch, tokens, width]``, weights as they are."""
        feeds = dict(zip(self.weights, weights, strict=True))
        for node in self.latent_nodes():
            parts = [x for latent, x in zip(self.latents, latents, strict=True) if latent.node is node]
            feeds[node] = place(torch.cat(parts, -1), self.dims[node])
        return feeds

    def feed_shape(self, node: Node, batch: int, tokens: int) -> tuple[int, ...]:
        """The shape a leaf takes at stand-in sizes."""
        return tuple(int(s) for s in shape_with(self.dims[node], batch, tokens))

    def roundings(self) -> int:
        """At most so many roundings lie between a leaf and K or V: the terms of every sum, and one for every op."""
        count = 0
        for node in self.order:
            if node.target in _PRODUCTS:
                left: Node = node.args[1 if node.target is aten.addmm.default else 0]  # type: ignore[assignment]
                count += _length(left, -1)
            elif node.target is aten.sum.dim_IntList:
                for dim in node.args[1]:  # type: ignore[union-attr]
                    count += _length(node.args[0], dim)  # type: ignore[arg-type]
            elif node.target not in REARRANGE:
                count += 1
        return count

    def signature(self) -> tuple[Any, ...]:
        """Equal for two cones that compute the same function of their leaves: the key under which a probe is
        remembered."""
        index = {node: i for i, node in enumerate(self.order)}

        def encode(value: Any) -> Any:
            if isinstance(value, Node):
                return ("node", index.get(value, -1))
            if isinstance(value, (list, tuple)):
                return tuple(encode(v) for v in value)
            return str(value)

        latents = set(self.latent_nodes())
        rows: list[Any] = [tuple((index[x.node], x.start, x.width) for x in self.latents)]
        for node in self.order:
            leaf = node in latents or node in self.weights
            args = () if leaf else encode(_resolved(node))
            layout = tuple(tuple((a.label[0], str(a.size)) for a in d) for d in self.dims[node])
            rows.append((leaf, node in latents, "" if leaf else str(node.target), args, layout, str(shape_of(node))))
        return tuple(rows)


def _length(node: Node, dim: Any) -> int:
    size = (shape_of(node) or (1,))[dim]
    return size if isinstance(size, int) else 1


def _resolved(node: Node) -> tuple[Any, ...]:
    """Arguments of a node, with those of the split a getitem reads from in place of the split itself."""
    if node.target is operator.getitem:
        split: Node = node.args[0]  # type: ignore[assignment]
        return (str(split.target), tuple(split.args), str(split.kwargs), node.args[1])
    return (tuple(node.args), str(node.kwargs))


def walk(roots: Iterable[tuple[Node, Dims]], dynamic: set[Node]) -> Cone:
    """Walk back from K and V with the axes attention gives them.

    Raises:
        WalkError: a key or value is read, with its heads, from something that is not linear in a latent.
    """
    cone = Cone()
    leaves: dict[Node, Dims] = {}
    _walk(cone, list(roots), dynamic, leaves)
    while True:
        shared = _shared_sources(leaves, dynamic)
        linear = [] if shared else _linear_in_others(leaves, dynamic)
        for node, dims in shared or linear:
            del leaves[node]
            _walk(cone, pull(node, dims) or [], dynamic, leaves, through=bool(linear))
        if not shared and not linear:
            break
    cuts: dict[Node, set[int]] = {node: {0, feature_width(dims)} for node, dims in leaves.items()}
    for node, dims in cone.dims.items():
        origin = _origin(node, dims) if HEAD not in labels(dims) and node in dynamic else None
        if origin is not None and origin[0] in leaves and node is not origin[0]:
            cuts[origin[0]] |= {origin[2], origin[2] + feature_width(dims)}
    for node in leaves:
        borders = sorted(cuts[node]) if len(cuts[node]) > 1 else [0, 0]  # a part of no width is a latent too
        cone.latents += [Latent(node, a, b - a) for a, b in pairwise(borders)]
    position = {n: i for i, n in enumerate(next(iter(cone.dims)).graph.nodes)}
    cone.order = sorted(cone.dims, key=position.__getitem__)
    return cone


def _walk(cone: Cone, roots: Pulled, dynamic: set[Node], leaves: dict[Node, Dims], through: bool = False) -> None:
    """Walk on from some values. One without heads is a leaf, unless it is one head's own, where heads are stacked: that
    ends at the next product. ``through`` goes on to leaves that are known, whatever lies between."""
    stack = [(node, dims, through) for node, dims in roots]
    while stack:
        node, dims, own = stack.pop()
        if node in cone.dims:
            _check_same_axes(node, cone.dims[node], dims)
            continue
        dims = dims if node in dynamic else without_ones(dims)
        cone.dims[node] = dims
        headed = HEAD in labels(dims)
        if node.op == "call_function" and node.target in CONSTANT:
            continue
        if node not in dynamic:
            pulled = pull(node, dims, _WEIGHT_OPS)
            if pulled is None:
                cone.weights.append(node)
        else:
            pulled = pull(node, dims, LINEAR if headed or own else REARRANGE)
            if pulled is None and headed:
                raise HeadedLeaf(node, dims)
            if pulled is None:
                leaves[node] = dims
        apart = headed and node.target in _STACKS and len(set(node.all_input_nodes)) > 1
        own = apart or (own and (through or node.target not in _PRODUCTS))
        stack += [(source, axes, own and HEAD not in labels(axes)) for source, axes in pulled or ()]


def _linear_in_others(leaves: dict[Node, Dims], dynamic: set[Node]) -> Pulled:
    """A leaf to walk on from, because it is linear in other leaves: the latent scaled, or through one more weight."""
    for leaf, dims in leaves.items():
        others = leaves.keys() - {leaf}
        stack, ends = list(pull(leaf, dims) or ()), set()
        seen: set[Node] = set()
        while stack:
            node, axes = stack.pop()
            if node in others or node not in dynamic:
                ends.add(node)
                continue
            pulled = None if node in seen else pull(node, axes)
            seen.add(node)
            if pulled is None:
                break
            stack += pulled
        else:
            if ends & others:
                return [(leaf, dims)]
    return []


def _shared_sources(leaves: dict[Node, Dims], dynamic: set[Node]) -> list[tuple[Node, Dims]]:
    """Leaves to walk on from, because they hold the same values as another: slices of one tensor that overlap, or a
    ``cat`` of which another leaf is a part."""
    origins = {node: _origin(node, dims) for node, dims in leaves.items()}
    spans = {node: (start, start + feature_width(leaves[node])) for node, (_, _, start) in origins.items()}
    for one, other in combinations(leaves, 2):
        if origins[one][0] is origins[other][0] and max(s[0] for s in (spans[one], spans[other])) < min(
            s[1] for s in (spans[one], spans[other])
        ):
            return [(n, leaves[n]) for n in (one, other) if n is not origins[n][0]]
    if len(leaves) > 2:
        for one, other in combinations(leaves, 2):
            if origins[one][0] is origins[other][0]:
                return [(n, leaves[n]) for n in (one, other) if n is not origins[n][0]]
    bases = {origin[0] for origin in origins.values()}
    for node, dims in leaves.items():
        if node.target is not aten.cat.default:
            continue
        for part, part_dims in pull(node, dims, _CUTS) or ():
            if part in dynamic and _origin(part, part_dims)[0] in bases - {origins[node][0]}:
                return [(node, dims)]
    return []


def _origin(node: Node, dims: Dims) -> tuple[Node, Dims, int]:
    """What a value without heads is cut from along its features: (tensor, its axes, first feature)."""
    offset = 0
    while True:
        pulled = pull(node, dims, _CUTS) if node.target is not aten.cat.default else None
        if pulled is None or len(pulled) != 1 or max(_features(dims), _features(pulled[0][1])) > 1:
            return node, dims, offset
        first = 0
        if node.target in (aten.slice.Tensor, operator.getitem):
            found = _first_feature(node, dims, pulled[0][1])
            if found is None:
                return node, dims, offset
            first = found
        offset += first
        node, dims = pulled[0]


def _features(dims: Dims) -> int:
    return sum(not a.resizable for d in dims for a in d)


def _first_feature(node: Node, dims: Dims, source: Dims) -> int | None:
    """Where a slice or a part of a split starts along the features; None when it cuts something else."""
    changed = [i for i, (a, b) in enumerate(zip(dims, source, strict=False)) if a != b]
    if len(dims) != len(source) or len(changed) > 1:
        return None
    if not changed:
        return 0
    if node.target is aten.slice.Tensor:
        start: Any = (node.args[2] if len(node.args) > 2 else 0) or 0
        if not isinstance(start, int) or (len(node.args) > 4 and node.args[4] != 1):
            return None
        size: Any = shape_with(source)[changed[0]]
        return start + size if start < 0 else start
    split: Any = node.args[0]
    index: Any = node.args[1]
    sizes = split.args[1]
    return sum(sizes[:index]) if isinstance(sizes, (list, tuple)) else index * sizes


def _check_same_axes(node: Node, one: Dims, other: Dims) -> None:
    def axes(dims: Dims) -> list[list[str]]:
        return [[a.label for a in d if a.resizable] for d in dims]

    if axes(one) != axes(other):
        raise WalkError(f"{describe(node)} is used with two different batch or token axes")


def _headed_leaf(node: Node) -> str:
    if node.op == "placeholder" or "index_copy" in str(node.target) or "scatter" in str(node.target):
        return (
            f"keys or values are stored for every head ({describe(node)}), so there is no latent to decode on: this is "
            "multi-head or grouped-query attention, or a cache that stores expanded keys"
        )
    if node.target is aten.cat.default:
        return (
            f"keys or values of every head are joined from several runs of tokens ({describe(node)}), which is not "
            "linear in a latent: a cache that stores expanded keys"
        )
    return f"keys or values with heads come out of {describe(node)}, which is not linear in a latent"


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
