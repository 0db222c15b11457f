"""Maps that are no view of a weight, computed in the graph: what K and V are for unit latents.

The cone is linear in the latent, so its values for the unit vectors are its matrix. It is written into the graph a
second time, on the identity in place of the cache: as many tokens as the latent is wide. All of it depends on weights
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mlacompile.passes.axes import BATCH, TOKEN, Dims
from mlacompile.passes.emit import Emitter
from mlacompile.passes.recognize import MLASite
from mlacompile.passes.replay import replay

aten = torch.ops.aten


def unit_response(emit: Emitter, site: MLASite, latent: int) -> dict[Node, Node]:
    """Every node of a site's cone for one sentence of the unit vectors of a latent and, last, zero; K and V among them.

    Other latents are zero.
    """
    cone, width = site.cone, site.cone.latents[latent].width
    value = site.leaf(cone.latents[latent].node)[0].meta["val"]
    like: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    feeds = {node: site.leaf(node)[0] for node in cone.weights}
    for node in cone.latent_nodes():
        parts = []
        for i, part in enumerate(cone.latents):
            if part.node is node and i == latent:
                parts.append(emit(aten.eye.m, width + 1, width, **like))
            elif part.node is node:
                parts.append(emit(aten.full.default, [width + 1, part.width], 0.0, **like))
        whole = parts[0] if len(parts) == 1 else emit(aten.cat.default, parts, 1)
        feeds[node] = _placed(emit, whole, cone.dims[node])
    return replay(cone, feeds, 1, width + 1, emit, casts=not site.leaves)


def _placed(emit: Emitter, x: Node, dims: Dims) -> Node:
    """``[tokens, features]`` laid out as one sentence of a leaf with these dims."""
    atoms = [a for d in dims for a in d]
    features = [a for a in atoms if not a.resizable]
    split = emit.view(x, [x.meta["val"].shape[0], *(int(a.size) for a in features)])
    numbers = iter(range(1, 1 + len(features)))
    order = [0 if a.label == TOKEN else next(numbers) for a in atoms if a.label != BATCH]
    moved = iter(emit.permute(split, order).meta["val"].shape)
    shape: list[int | Node] = []
    for dim in dims:
        size = 1
        for atom in dim:
            size *= 1 if atom.label == BATCH else int(next(moved))
        shape.append(size)
    return emit.view(emit.permute(split, order), shape)
