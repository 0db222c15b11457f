"""Caches that store keys and values of every head: what a step writes into them, and whether it comes from a latent.

Before transformers 5.15, and in much code that is published with checkpoints, keys and values are expanded first and
cached then. Nothing can be absorbed in such a graph alone, but its own writes show that the cache could hold latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mlacompile.passes.axes import BATCH, HEAD, TOKEN, Dims, dims_for, shape_of
from mlacompile.passes.cone import Cone, HeadedLeaf, WalkError, walk
from mlacompile.passes.scores import PRODUCTS
from mlacompile.passes.source import describe, source_of

aten = torch.ops.aten

#: Ops that put new rows into a cache, and which argument the rows are.
_WRITES: dict[Any, int] = {
    aten.index_copy.default: 3,
    aten.slice_scatter.default: 1,
    aten.index_put.default: 2,
    aten.scatter.src: 3,
    aten.copy.default: 1,
}
_READS = (aten.slice.Tensor, aten.alias.default, aten.clone.default, aten.expand.default)


def expanded_cache(k: Node, v: Node, dynamic: set[Node]) -> str | None:
    """Why a site whose keys and values are cached with their heads is refused, when what is written into that cache can
    be traced back to latents; None when it cannot."""
    cone = written_cone(k, v, dynamic)
    if cone is None:
        return None
    if _expanded_apart(k, dynamic):
        return (
            f"keys and values of several runs of tokens are expanded apart and joined after ({source_of(k)}): join the "
            "latents, expand them together, and attention can be absorbed"
        )
    width = sum(latent.width for latent in cone.latents)
    k_shape, v_shape = shape_of(k), shape_of(v)
    assert k_shape is not None and v_shape is not None  # noqa: PT018
    if width >= k_shape[1] * k_shape[3]:  # type: ignore[operator]
        return None  # what keys are projected from is no smaller than they are
    expanded = k_shape[1] * (k_shape[3] + v_shape[3])
    return (
        f"the cache stores keys and values of every head, {expanded} values a token; what is written into it comes "
        f"from {width} values a token ({', '.join(describe(n) for n in cone.latent_nodes())}): cache those instead "
        "(LatentCache, or transformers 5.15 and later), and attention can be absorbed"
    )


def written_cone(k: Node, v: Node, dynamic: set[Node]) -> Cone | None:
    """The cone of the rows that a step writes into caches of keys ``[B, H, T, D]`` and values; None when they are no
    such caches, or the rows do not come from at most two tensors without heads."""
    rows = [_written(node, dynamic) for node in (k, v)]
    if rows[0] is None or rows[1] is None:
        return None
    try:
        cone = walk([rows[0], rows[1]], dynamic)
    except WalkError:
        return None
    return cone if cone.weights and 0 < len(cone.latent_nodes()) <= 2 else None


def _written(node: Node, dynamic: set[Node]) -> tuple[Node, Dims] | None:
    """The rows last written into what a node is read from, and their axes."""
    leaf = _headed_leaf(node, dynamic)
    names = None if leaf is None else _axis_names(leaf.node, leaf.dims)
    source = None if leaf is None or names is None else _rows(leaf.node)
    shape = None if source is None else shape_of(source)
    if source is None or names is None or shape is None or len(shape) != len(names):
        return None
    return source, dims_for(shape, names)


def _expanded_apart(node: Node, dynamic: set[Node]) -> bool:
    """Whether keys are joined from runs of tokens each of which comes from latents, rather than from a cache."""
    leaf = _headed_leaf(node, dynamic)
    names = None if leaf is None or leaf.node.target is not aten.cat.default else _axis_names(leaf.node, leaf.dims)
    if leaf is None or names is None:
        return False
    parts: Any = leaf.node.args[0]
    shapes = [shape_of(part) for part in parts]
    return all(
        s is not None and _is_expanded(p, dims_for(s, names), dynamic) for p, s in zip(parts, shapes, strict=True)
    )


def _is_expanded(node: Node, dims: Dims, dynamic: set[Node]) -> bool:
    """Whether keys are made here, by a product, and not read from a cache."""
    try:
        nodes = set(walk([(node, dims)], dynamic).order)
    except WalkError:
        return False
    stack = [n for n in nodes if n not in dynamic]  # a cache that a module holds looks constant, and what is made of it
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in nodes:
                nodes.add(source)
                stack.append(source)
    return any(n.target in (*PRODUCTS, aten.addmm.default) for n in nodes)


def _headed_leaf(node: Node, dynamic: set[Node]) -> HeadedLeaf | None:
    """Where the walk from keys ``[B, H, T, D]`` ends with heads."""
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        return None
    try:
        walk([(node, dims_for(shape, (BATCH, HEAD, TOKEN, "D")))], dynamic)
    except HeadedLeaf as leaf:
        return leaf
    except WalkError:
        pass
    return None


def _axis_names(node: Node, dims: Dims) -> list[str] | None:
    """One label a dimension; None where a dimension has several."""
    return None if any(len(d) > 1 for d in dims) else [d[0].label if d else f"one{i}" for i, d in enumerate(dims)]


def _rows(node: Node) -> Node | None:
    """Through reads and nested writes to the newest rows."""
    found: Node | None = None
    here: Any = node
    while isinstance(here, Node) and here.op == "call_function":
        parts: Any = here.args[0]
        if here.target in _WRITES:
            found = here = here.args[_WRITES[here.target]]  # type: ignore[assignment]
        elif here.target is aten.cat.default and len(parts) == 2 and found is None:
            return parts[1]  # type: ignore[no-any-return]
        elif here.target in _READS and found is None:
            here = parts
        else:
            break
    return found


__all__ = ["expanded_cache", "written_cone"]
