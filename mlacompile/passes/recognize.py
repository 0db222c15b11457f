"""Stage 3: attention op → ``MLASite``: geometry, latents, exact views of the live weights.

Walk back from K and V (``cone.py``) until values have no heads, probe what lies between (``probe.py``), and write
down the result as a site. Everything that is not latent attention ends in a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from mlacompile.geometry import MLAGeometry
from mlacompile.logs import log
from mlacompile.passes.axes import BATCH, HEAD, TOKEN, Dims, Size, dims_for, shape_of
from mlacompile.passes.canonicalize import attention_nodes
from mlacompile.passes.cone import Cone, HeadedLeaf, Latent, WalkError, dynamic_nodes, walk
from mlacompile.passes.maps import Plain, Probe
from mlacompile.passes.precision import working_dtype
from mlacompile.passes.probe import probe
from mlacompile.passes.pull import RESHAPES, upstream
from mlacompile.passes.source import GRAPH_BREAK, behind_graph_break, describe, source_of
from mlacompile.passes.written import expanded_cache

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """A canonical attention node, unpacked. Shapes: q ``[B, H, S, D]``, k ``[B, H, T, D]``, v ``[B, H, T, V]``."""

    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    causal: bool
    scale: float
    grouped: bool
    prefix: Any = None  # attend to this many of the first tokens of k and v only (an int or a node); None: to all
    sink: Node | None = None  # one more score a head and query, without a value

    @classmethod
    def of(cls, node: Node) -> Attention:
        """Unpack a ``mlacompile::attention`` node."""
        return cls(node, *node.args, **node.kwargs)  # type: ignore[arg-type]

    @property
    def queries(self) -> Size:
        """Query tokens in one call."""
        return shape_of(self.q)[2]  # type: ignore[index]

    @property
    def context(self) -> Size:
        """Cached tokens attended to."""
        return shape_of(self.node.args[1])[2]  # type: ignore[arg-type,index]

    def without_prefix(self) -> Attention:
        """The same attention with a cut to the first tokens, which acts on k and v alike, taken out of them."""
        ends = [_prefix_end(x) for x in (self.k, self.v)]
        if ends[0] is None or ends[0] != ends[1]:
            return self
        return replace(self, k=self.k.args[0], v=self.v.args[0], prefix=ends[0])  # type: ignore[arg-type]


def _prefix_end(node: Node) -> Any:
    """n when the node is ``x[:, :, :n]`` and shortens x, else None."""
    if node.target is not aten.slice.Tensor or len(node.args) != 4 or node.args[1:3] != (2, 0):
        return None
    whole, kept = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    return None if whole is None or kept is None or whole[2] == kept[2] else node.args[3]


@dataclass(frozen=True)
class MLASite:
    """One attention op that is latent attention, and everything needed to rewrite it."""

    attention: Attention
    geometry: MLAGeometry
    cone: Cone
    probe: Probe
    head_size: int
    v_size: int
    leaves: dict[Node, tuple[Node, Dims]] = field(default_factory=dict)  # leaves moved to another graph (validation)

    @property
    def c_kv(self) -> Latent:
        """The latent. It lies in whatever axes ``cone.dims`` says."""
        return self.cone.latents[self.probe.c_kv]

    @property
    def k_pe(self) -> Latent | None:
        """The rotary key, or None."""
        return None if self.probe.k_pe is None else self.cone.latents[self.probe.k_pe]

    @property
    def dtype(self) -> torch.dtype:
        """What attention is computed in."""
        return working_dtype(self.attention.q, self.attention.k, self.attention.v)

    @property
    def mixed(self) -> bool:
        """Whether operands come in several dtypes, and have to be brought into one."""
        leaves = (self.leaf(n)[0] for n in (*self.cone.latent_nodes(), *self.cone.weights))
        return any(n.meta["val"].dtype != self.dtype for n in (self.attention.q, *leaves))

    def leaf(self, node: Node) -> tuple[Node, Dims]:
        """A latent or weight of the cone as it is found in the graph that is rewritten, and its axes."""
        return self.leaves.get(node) or (node, self.cone.dims[node])


@dataclass(frozen=True)
class Refusal:
    """An attention op that is left as it was, and why."""

    attention: Attention
    reason: str


class Recognizer:
    """Finds latent attention in a functional ATen graph; remembers what it learned from equal cones.

    Args:
        weights: placeholders that hold parameters or constant buffers, not activations or caches.
    """

    def __init__(self, graph: Graph, weights: set[Node]) -> None:
        self.graph = graph
        self.dynamic = dynamic_nodes(graph, weights)
        self._known: dict[Any, Probe | WalkError] = {}

    def find(self) -> Iterator[MLASite | Refusal]:
        """All attention ops of the graph in order, each recognised or refused."""
        for node in attention_nodes(self.graph):
            attention = Attention.of(node)
            try:
                yield self._site(attention)
            except HeadedLeaf as error:
                yield Refusal(attention, self._headed(attention, error))
            except WalkError as error:
                yield Refusal(attention, str(error))
            except Exception as error:  # one site must not cost the whole model its compilation
                log.exception("attention at %s could not be looked into", source_position(attention))
                yield Refusal(attention, internal_error(error))

    def _headed(self, attention: Attention, error: HeadedLeaf) -> str:
        """Why keys of every head that come out of a cache, or from nowhere, cannot be absorbed."""
        if error.node.op == "placeholder" and behind_graph_break(attention.node):
            return (
                f"keys and values come expanded into this graph, so what they are made of cannot be seen: {GRAPH_BREAK}"
            )
        return expanded_cache(attention.k, attention.v, self.dynamic) or str(error)

    def _site(self, attention: Attention) -> MLASite:
        q, k, v = (shape_of(n) for n in (attention.q, attention.k, attention.v))
        if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
            raise WalkError(
                f"attention over {len(q or ())}-dimensional queries; [batch, heads, tokens, features] was expected"
            )
        if not k[1] == v[1] or k[1] not in (1, q[1]):
            raise WalkError(_grouped(q[1], k[1]))
        if not all(isinstance(s, int) for s in (q[1], q[3], v[3])):
            raise WalkError("heads or head sizes are symbolic; mark only batch and lengths as dynamic")
        if k[2] == 1:
            raise WalkError("a context of one token: there is nothing to keep compressed yet")
        attention = attention.without_prefix()
        k, v = shape_of(attention.k), shape_of(attention.v)
        assert k is not None and v is not None  # noqa: PT018
        dims = dims_for(k, (BATCH, HEAD, TOKEN, "D")), dims_for(v, (BATCH, HEAD, TOKEN, "D"))
        cone = walk([(attention.k, dims[0]), (attention.v, dims[1])], self.dynamic)
        found = self._probe(cone, attention)
        cone = cone.regrouped(found.parts) if found.parts else cone
        if k[1] != q[1] and not (isinstance(found.w_uk, Plain) and isinstance(found.w_uv, Plain)):
            raise WalkError(_grouped(q[1], k[1]))
        geometry = _geometry(cone, found, int(q[1]))
        _check_compressed(attention, cone, found, geometry)
        _check_dtypes(attention, cone)
        _check_tokens(cone)
        return MLASite(attention, geometry, cone, found, int(q[3]), int(v[3]))

    def _probe(self, cone: Cone, attention: Attention) -> Probe:
        position = {n: i for i, n in enumerate(cone.order)}
        key = (cone.signature(), position[attention.k], position[attention.v])
        if key not in self._known:
            try:
                self._known[key] = probe(cone, attention.k, attention.v)
            except WalkError as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, WalkError):
            raise known
        return known


def _grouped(heads: Size, key_heads: Size) -> str:
    return (
        f"{heads} query heads share {key_heads} key heads: grouped-query attention has no latent "
        "(`mlacompile convert --from-gqa` gives it one)"
    )


def _geometry(cone: Cone, found: Probe, heads: int) -> MLAGeometry:
    return MLAGeometry(
        heads=heads,
        rank=cone.latents[found.c_kv].width,
        nope=found.k_rows[1],
        rope=0 if found.k_pe is None else cone.latents[found.k_pe].width,
        v=found.v_rows[1],
    )


def _check_compressed(attention: Attention, cone: Cone, found: Probe, geometry: MLAGeometry) -> None:
    """Queries, keys and values of one tensor, and keys no wider than it, are plain multi-head attention."""
    latent, q_shape = cone.latents[found.c_kv].node, shape_of(attention.q)
    if geometry.rank < geometry.heads * geometry.nope or isinstance(found.w_uk, Plain):
        return
    queries = dims_for(q_shape or (), (BATCH, HEAD, "S", "D"))
    if any(node is latent for node, _ in upstream(attention.q, queries)):
        raise WalkError(
            f"queries, keys and values are projected from the same {geometry.rank} values a token "
            f"({describe(latent)}): ordinary multi-head attention, in which nothing is compressed"
        )


def _check_dtypes(attention: Attention, cone: Cone) -> None:
    leaves = (attention.q, *cone.latent_nodes(), *cone.weights)
    for dtype in dict.fromkeys(n.meta["val"].dtype for n in leaves):
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise WalkError(f"attention in {dtype}; float16, bfloat16 or float32 was expected")


def _check_tokens(cone: Cone) -> None:
    for node in cone.latent_nodes():
        names = [a.label for d in cone.dims[node] for a in d if a.resizable]
        if sorted(set(names)) != sorted(names):
            raise WalkError("the batch or token axis of the latent is split")


def mask_without_heads(mask: Node) -> Node | None:
    """The mask as a node that is the same for all heads, or None when it may differ from head to head."""
    shape = shape_of(mask)
    while shape is not None and len(shape) >= 3 and shape[-3] != 1:  # three dimensions are [heads, queries, tokens]
        source: Any = mask.args[0] if mask.args else None
        before = shape_of(source) if isinstance(source, Node) else None
        # A reshape that puts ones in front does what broadcasting would.
        leading = mask.target in RESHAPES and before is not None and shape == (1,) * (len(shape) - len(before)) + before
        if mask.target is not aten.expand.default and not leading:
            return None
        mask, shape = source, before
    return mask


def internal_error(error: Exception) -> str:
    """The reason of a site at which mlacompile itself failed."""
    return f"mlacompile failed on it ({type(error).__name__}: {error}): this is a bug, please report it"


def source_position(attention: Attention) -> str:
    """``file:line`` of an attention op."""
    return source_of(attention.node)


__all__ = ["Attention", "MLASite", "Recognizer", "Refusal", "mask_without_heads", "source_position"]
