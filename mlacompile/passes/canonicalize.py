"""Stage 1: every spelling of attention becomes one op.

In the Dynamo graph:  ``scaled_dot_product_attention(q, k, v, …)``            →  ``mlacompile::attention``
In the ATen graph:    ``bmm(softmax(bmm(q, kᵀ) · scale + mask), v)``, with      →  ``mlacompile::attention``
                      views, casts and several score terms anywhere between

The second runs after functionalization: einsum, matmul and ``@`` are all ``bmm`` there, and scores updated in place
are plain
dataflow. What an attention node replaced is kept beside it (``meta["mlacompile_original"]``), so that a site nobody
rewrites is put back exactly as it was.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import mlacompile.ops.attention  # noqa: F401  (registers the op)
from mlacompile.logs import log
from mlacompile.passes.softmax import NotAttention, match_softmax, softmaxes, why_unmatched
from mlacompile.passes.source import op_name, source_of

aten = torch.ops.aten
ORIGINAL = "mlacompile_original"
JOINED = "mlacompile_joined"  # of an op that stands for several: (its part, arguments, meta) of each
_SDPA = (
    torch.nn.functional.scaled_dot_product_attention,
    aten.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
)
_SDPA_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def attention_nodes(graph: Graph) -> list[Node]:
    """All canonical attention nodes, in order."""
    return list(graph.find_nodes(op="call_function", target=torch.ops.mlacompile.attention.default))


def canonicalize_sdpa(gm: GraphModule) -> GraphModule:
    """A copy of a Dynamo graph in which every SDPA call without dropout is a ``mlacompile::attention``."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    for node in [n for target in _SDPA for n in graph.find_nodes(op="call_function", target=target)]:
        call = dict(zip(_SDPA_ARGS, node.args, strict=False)) | node.kwargs
        head_size = call["query"].meta["example_value"].shape[-1]
        scale = call.get("scale")
        if call.get("dropout_p", 0.0) or isinstance(head_size, torch.SymInt) or isinstance(scale, Node):
            continue
        args = (
            *(call[a] for a in _SDPA_ARGS[:3]),
            call.get("attn_mask"),
            bool(call.get("is_causal", False)),
            1.0 / math.sqrt(head_size) if scale is None else float(scale),
            bool(call.get("enable_gqa", False)),
        )
        with graph.inserting_before(node):
            new = graph.call_function(torch.ops.mlacompile.attention.default, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    copy.recompile()
    return copy


def canonicalize_softmax(graph: Graph, dynamic: set[Node] | None = None) -> list[tuple[Node, str]]:
    """Find attention written out as products and softmax in a functional ATen graph.

    Args:
        dynamic: nodes that depend on more than weights, where known.
    Returns:
        each softmax that looks like attention and was left alone, with the reason.
    """
    left: list[tuple[Node, str]] = []
    for softmax in list(softmaxes(graph)):
        try:
            reason = None if match_softmax(softmax, dynamic) else why_unmatched(softmax)
        except NotAttention as error:
            reason = str(error)
        except Exception as error:  # one softmax must not cost the whole model its compilation
            log.exception("the softmax at %s could not be looked into", source_of(softmax.out))
            reason = f"mlacompile failed on it ({type(error).__name__}: {error}): this is a bug, please report it"
        left += [] if reason is None else [(softmax.out, reason)]
    return left


def opaque_attention(graph: Graph) -> list[tuple[Node, str]]:
    """Calls of attention that cannot be looked into, each with what to do about it."""
    left = []
    for node in graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        replaced = all(not user.users for user in node.users)
        if _sounds_like_attention(name) and not name.startswith("mlacompile::") and not replaced:
            reason = (
                f"attention is computed by {name}, which cannot be looked into; use scaled_dot_product_attention, or "
                "attention written out (attn_implementation='sdpa' or 'eager')"
            )
            left.append((node, reason))
    return left


def _sounds_like_attention(name: str) -> bool:
    return any(part in name.lower() for part in ("attention", "attn", "flash_mla"))


def restore(node: Node) -> None:
    """Put back what an attention node stands for."""
    graph = node.graph
    for part, args, meta in node.meta.get(JOINED, ()):
        with graph.inserting_before(part):
            single = graph.call_function(torch.ops.mlacompile.attention.default, args)
        single.meta = meta
        part.replace_all_uses_with(single)
        restore(single)
    if JOINED in node.meta:
        return
    original: Node | None = node.meta.get(ORIGINAL)
    if original is None:
        q, k, v, mask, causal, scale, gqa = node.args
        kwargs: dict[str, Any] = {"scale": scale, "enable_gqa": gqa}
        with graph.inserting_before(node):
            original = graph.call_function(
                aten.scaled_dot_product_attention.default, (q, k, v, mask, 0.0, causal), kwargs
            )
        original.meta = dict(node.meta)
        node.replace_all_uses_with(original)
    else:
        anchor: Node = node.meta["mlacompile_anchor"]
        anchor.replace_all_uses_with(original)


def may_hold_attention(gm: GraphModule) -> bool:
    """Whether a Dynamo graph calls attention or a softmax at all; if not, it need not be traced."""
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            if "softmax" in name or name == "exp" or _sounds_like_attention(name):
                return True
    return False
