"""What K and V are made of: walk back from them to latents and weights, and run that part again at any size.

The walk ends where a value no longer has heads (a *latent*), at values that depend on parameters alone (*weights*),
and at
whatever is not linear. It knows no names. The part in between, the cone, acts on every cached token alike, so it can be
evaluated on one sentence of two tokens as well as on 64 of 8192.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from mlacompile.passes.axes import (
    BATCH,
    CONSTANT,
    HEAD,
    LINEAR,
    REARRANGE,
    TOKEN,
    Dims,
    labels,
    pull,
    shape_of,
    shape_with,
)
from mlacompile.passes.source import describe

aten = torch.ops.aten

_WEIGHT_OPS = REARRANGE | {
    t: LINEAR[t] for t in (aten.expand.default, aten.slice.Tensor, aten.select.int, operator.getitem)
}


class WalkError(Exception):
    """The walk met something that is not latent attention; the message is a reason a user can read."""


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


@dataclass
class Cone:
    """The part of a graph between K and V and the latents and weights they are made of."""

    dims: dict[Node, Dims] = field(default_factory=dict)
    order: list[Node] = field(default_factory=list)
    latents: list[Node] = field(default_factory=list)
    weights: list[Node] = field(default_factory=list)

    def evaluate(self, feeds: dict[Node, torch.Tensor], batch: int, tokens: int) -> dict[Node, torch.Tensor]:
        """Run the cone in float64 at ``batch`` sentences of ``tokens`` tokens, with ``feeds`` for latents and
        weights."""
        env = dict(feeds)
        for node in self.order:
            if node not in env:
                env[node] = _run(node, env, self.dims[node], batch, tokens)
        return env

    def feed_shape(self, node: Node, batch: int, tokens: int) -> tuple[int, ...]:
        """The shape a leaf takes at stand-in sizes."""
        return tuple(int(s) for s in shape_with(self.dims[node], batch, tokens))

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

        rows = []
        for node in self.order:
            leaf = node in self.latents or node in self.weights
            args = () if leaf else encode(_resolved(node))
            layout = tuple(tuple((a.label[0], str(a.size)) for a in d) for d in self.dims[node])
            rows.append(
                (leaf, node in self.latents, "" if leaf else str(node.target), args, layout, str(shape_of(node)))
            )
        return tuple(rows)


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
    stack = list(roots)
    seen_leaf: set[Node] = set()
    while stack:
        node, dims = stack.pop()
        if node in cone.dims:
            _check_same_axes(node, cone.dims[node], dims)
            continue
        cone.dims[node] = dims
        if node.op == "call_function" and node.target in CONSTANT:
            continue
        if node not in dynamic:
            pulled = pull(node, dims, _WEIGHT_OPS)
            if pulled is None and node not in seen_leaf:
                cone.weights.append(node)
        elif HEAD not in labels(dims):
            pulled = pull(node, dims, REARRANGE)
            if pulled is None and node not in seen_leaf:
                cone.latents.append(node)
        else:
            pulled = pull(node, dims)
            if pulled is None:
                raise WalkError(_headed_leaf(node))
        if pulled is None:
            seen_leaf.add(node)
        else:
            stack.extend(pulled)
    position = {n: i for i, n in enumerate(next(iter(cone.dims)).graph.nodes)}
    cone.order = sorted(cone.dims, key=position.__getitem__)
    return cone


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
    return f"keys or values with heads come out of {describe(node)}, which is not linear in a latent"


def _run(node: Node, env: dict[Node, torch.Tensor], dims: Dims, batch: int, tokens: int) -> torch.Tensor:
    """One node at stand-in sizes: shapes come from the axes, not from the arguments the graph was traced with."""
    shape = [int(s) for s in shape_with(dims, batch, tokens)]
    target = node.target
    if target in CONSTANT:
        fill = 0.0 if "zeros" in str(target) else float("nan")
        return torch.full(shape, fill, dtype=torch.float64)
    args = [_value(a, env) for a in node.args]
    if REARRANGE.get(target) is LINEAR[aten.view.default]:  # type: ignore[arg-type]
        return args[0].reshape(shape)
    if target is aten.expand.default:
        return args[0].expand(shape)
    if target is aten.repeat.default:
        return _repeat_to(args[0], shape)
    if target is aten._to_copy.default:
        return args[0]
    if target is aten.copy.default:
        return args[1].expand(shape)
    if target is operator.getitem:
        return _part_of_split(node, env)
    if target in (aten.slice.Tensor, aten.slice_scatter.default):
        whole = args[0] if target is aten.slice.Tensor else args[1]
        if list(whole.shape) == shape:
            return whole
    return target(*args, **node.kwargs)  # type: ignore[operator,no-any-return]


def _value(arg: Any, env: dict[Node, torch.Tensor]) -> Any:
    if isinstance(arg, Node):
        if arg not in env:
            return None  # an operand the axes do not need, such as the base a full slice_scatter overwrites
        return env[arg]
    if isinstance(arg, (list, tuple)):
        return [_value(a, env) for a in arg]
    return arg


def _repeat_to(x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    padded = x.reshape([1] * (len(shape) - x.dim()) + list(x.shape))
    return padded.repeat([s // p for s, p in zip(shape, padded.shape, strict=True)])


def _part_of_split(node: Node, env: dict[Node, torch.Tensor]) -> torch.Tensor:
    split, index = node.args
    source = env[split.args[0]]  # type: ignore[union-attr,index]
    if split.target is aten.unbind.int:  # type: ignore[union-attr]
        return source.select(split.args[1] if len(split.args) > 1 else 0, index)  # type: ignore[union-attr,arg-type]
    return split.target(source, *split.args[1:], **split.kwargs)[index]  # type: ignore[union-attr,operator,no-any-return,index]


__all__ = ["BATCH", "TOKEN", "Cone", "WalkError", "dynamic_nodes", "walk"]
