"""Stage 4, the other form: attention stays expanded, and is asked no more than it has to compute.

    in chunks    out = mla_prefill(q, c_kv, k_pe, w_uk, w_uv, …)    what is written of a cache, a chunk at a time
    directly     out = attention(q, k, v), causal                   the mask said no more than that, and is gone

The first also decides at run time, where the number of queries is not known before, to absorb instead.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from mlacompile.options import Options
from mlacompile.passes.absorb import Maps, add_bias, finish, latent_of, scaled
from mlacompile.passes.axes import BATCH
from mlacompile.passes.emit import Emitter
from mlacompile.passes.maps import Plain, UpProjection
from mlacompile.passes.recognize import MLASite
from mlacompile.passes.visibility import emit_arguments, understand

aten = torch.ops.aten


def why_not_in_chunks(site: MLASite) -> str | None:
    """Why a site cannot be expanded by ``mla_prefill``, or None."""
    found = site.probe
    if isinstance(found.w_uk, Plain) or isinstance(found.w_uv, Plain):
        return "it attends to the latent already"
    if site.k_pe is not None and not isinstance(found.w_pe, Plain):
        return "its rotary key is mapped on its way into K"
    return None if site.attention.sink is None else "it has a sink"


def expand_in_chunks(site: MLASite, options: Options, *, chunk: int, absorb_up_to: int = 0) -> Node:
    """Rewrite one site that ``why_not_in_chunks`` has nothing against; returns the ``mla_prefill`` node.

    chunk: tokens expanded at a time. absorb_up_to: with no more queries than this the op attends to the latent itself.
    """
    attention, found, emit = site.attention, site.probe, Emitter(site.attention.node)
    emit.known = {BATCH: emit.size(attention.q, 0)}
    maps = Maps(emit, site)
    k_pe = None if site.k_pe is None else scaled(emit, latent_of(emit, site, site.k_pe), found.w_pe)
    seen = emit_arguments(emit, understand(attention), attention.q)
    prefill = emit(
        torch.ops.mlacompile.mla_prefill.default,
        *(emit.by_token(attention.q), latent_of(emit, site, site.c_kv), k_pe),
        *(_weight(emit, site, maps, found.w_uk, found.k_rows), _weight(emit, site, maps, found.w_uv, found.v_rows)),
        *(seen.mask, seen.start, seen.length),
        scale=attention.scale,
        causal=seen.causal,
        nope_at=found.k_rows[0],
        pe_at=0 if site.k_pe is None else found.pe_rows[0],
        chunk=chunk,
        absorb_up_to=absorb_up_to,
        impl="reference" if options.kernel == "reference" else "auto",
    )
    out = emit(operator.getitem, prefill, 0)
    if found.v_bias is not None:
        out = add_bias(emit, maps.v_bias(found.v_bias), found.v_bias, out)
    finish(emit, site, out)
    return prefill


def _weight(emit: Emitter, site: MLASite, maps: Maps, found: UpProjection, rows: tuple[int, int]) -> Node:
    """An up-projection of every head, ``[H, rows, R]``, its factor included."""
    weight = maps.of(found, site.probe.c_kv, rows)
    assert weight is not None
    weight = scaled(emit, weight, found)
    heads = site.geometry.heads
    return weight if weight.meta["val"].shape[0] == heads else emit(aten.expand.default, weight, [heads, -1, -1])


def expand_directly(site: MLASite, options: Options) -> Node:
    """Drop a mask that says no more than "causal", or nothing; returns the node that computes attention."""
    emit = Emitter(site.attention.node)
    q, k, v, _, _, scale, grouped = site.attention.node.args[:7]
    causal = understand(site.attention).causal
    attend = emit(
        *(aten.scaled_dot_product_attention.default, emit.by_token(q), k, v, None, 0.0, causal),  # type: ignore[arg-type]
        scale=scale,
        enable_gqa=grouped,
    )
    out = emit(aten.clone.default, attend, memory_format=torch.contiguous_format)
    site.attention.node.replace_all_uses_with(out)
    return attend
