"""Stage 4: attention over expanded keys becomes attention over the latent.

    before   k, v = expand(c_kv), cat(…, k_pe);  out = attention(q, k, v)
    after    q_latent = q_nope · w_uk;  o_latent = mla_decode(q_latent, q_pe, c_kv, k_pe);  out = o_latent · w_uvᵀ

The products are batched over heads on views of the weights, so nothing is copied and a weight changed in place is seen.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

import mlacompile.ops  # noqa: F401  (registers mla_decode)
from mlacompile.options import Options
from mlacompile.passes.axes import Size
from mlacompile.passes.emit import Emitter
from mlacompile.passes.probe import WeightView
from mlacompile.passes.recognize import MLASite, mask_without_heads
from mlacompile.passes.views import View
from mlacompile.passes.visibility import emit_arguments, understand

aten = torch.ops.aten

#: Up to this many query tokens are decoded on the latent when ``form="auto"``.
DECODE_QUERIES = 8


def choose_form(site: MLASite, options: Options) -> tuple[str, str]:
    """ "absorbed" or "expanded" for a site, and why."""
    queries: Size = site.attention.queries
    if options.form != "auto":
        return options.form, f"form={options.form!r} was asked for"
    if isinstance(queries, int) and queries <= DECODE_QUERIES:
        return (
            "absorbed",
            f"{queries} query tokens: decoding on the latent reads {site.geometry.latent_width} values a token",
        )
    count = queries if isinstance(queries, int) else f"a varying number of ({queries})"
    return "expanded", f"{count} query tokens: prefill keeps the expanded form, in which a score costs fewer operations"


def refuse(site: MLASite) -> str | None:
    """Why a recognised site cannot be absorbed, or None."""
    mask = site.attention.mask
    if mask is None:
        return None
    value = mask.meta["val"]
    if value.dim() not in (2, 3, 4):
        return f"the mask has {value.dim()} dimensions; [batch, heads, queries, tokens] or fewer was expected"
    if mask_without_heads(mask) is None:
        return "the mask differs from head to head, or may; a mask shared by all heads was expected"
    return None


def absorb(site: MLASite, options: Options) -> Node:
    """Rewrite one site; returns the ``mla_decode`` node."""
    attention, found, emit = site.attention, site.probe, Emitter(site.attention.node)
    q_latent = _up(emit, _rows(emit, attention.q, found.k_rows), weight_view(emit, site, found.w_uk), transposed=False)
    q_latent = _scaled(emit, q_latent, found.w_uk.scale)
    q_pe, k_pe = None, None
    if site.k_pe is not None:
        q_pe = _scaled(emit, _rows(emit, attention.q, found.pe_rows), found.pe_scale)
        k_pe = _first_tokens(emit, emit.arrange(site.k_pe, site.cone.dims[site.k_pe], "BTD"), attention.prefix)
    c_kv = _first_tokens(emit, emit.arrange(site.c_kv, site.cone.dims[site.c_kv], "BTD"), attention.prefix)
    seen = emit_arguments(emit, understand(attention), attention.q)
    decode = emit(
        torch.ops.mlacompile.mla_decode.default,
        *(q_latent, q_pe, c_kv, k_pe, seen.mask, seen.start, seen.length),
        scale=attention.scale,
        causal=seen.causal,
        impl=options.kernel,
    )
    out = _up(emit, emit(operator.getitem, decode, 0), weight_view(emit, site, found.w_uv), transposed=True)
    out = _scaled(emit, out, found.w_uv.scale)
    if found.v_bias is not None:
        out = _add_bias(emit, site, found.v_bias, out)
    first, rows = found.v_rows
    if rows != site.v_size:
        out = emit(aten.constant_pad_nd.default, out, [first, site.v_size - first - rows])
    # What follows was traced on contiguous attention outputs, and views them; Inductor fuses this copy away.
    out = emit(aten.clone.default, out, memory_format=torch.contiguous_format)
    attention.node.replace_all_uses_with(out)
    return decode


def weight_view(emit: Emitter, site: MLASite, found: WeightView) -> Node:
    """The view of a live weight, as nodes (without its factor)."""
    return emit_view(emit, site.cone.weights[found.leaf], found.view)


def emit_view(emit: Emitter, node: Node, view: View) -> Node:
    """``View.apply`` as nodes."""
    for dim, start, length in view.narrows:
        node = emit.narrow(node, dim, start, length)
    node = emit.view(node, list(view.shape))
    for dim, (start, length) in enumerate(view.ranges):
        node = emit.narrow(node, dim, start, length)
    kept = [d for d in view.order if d >= 0]
    node = emit.permute(node, [*kept, *(d for d in range(len(view.shape)) if d not in kept)])
    for _ in range(len(view.shape) - len(kept)):
        node = emit(aten.squeeze.dim, node, -1)
    for axis, factor in enumerate(view.order):
        if factor < 0:
            node = emit(aten.unsqueeze.default, node, axis)
    return node


def _first_tokens(emit: Emitter, x: Node, count: int | Node | None) -> Node:
    """``x[:, :count]``."""
    return x if count is None else emit(aten.slice.Tensor, x, 1, 0, count)


def _rows(emit: Emitter, x: Node, rows: tuple[int, int]) -> Node:
    return emit.narrow(x, 3, *rows)


def _scaled(emit: Emitter, x: Node, factor: float) -> Node:
    return x if factor == 1.0 else emit(aten.mul.Tensor, x, factor)


def _up(emit: Emitter, x: Node, weight: Node, *, transposed: bool) -> Node:
    """Per-head product ``[B, H, S, M] · [H, M, N] → [B, H, S, N]`` as one batched product over heads."""
    batch, heads, queries = (emit.size(x, d) for d in range(3))
    by_head = emit(aten.reshape.default, emit.permute(x, [1, 0, 2, 3]), [heads, -1, emit.size(x, 3)])
    right = emit.permute(weight, [0, 2, 1]) if transposed else weight
    product = emit(aten.bmm.default, by_head, right)
    shaped = emit(aten.reshape.default, product, [heads, batch, queries, emit.size(product, 2)])
    return emit.permute(shaped, [1, 0, 2, 3])


def _add_bias(emit: Emitter, site: MLASite, found: WeightView, out: Node) -> Node:
    bias = _scaled(emit, weight_view(emit, site, found), found.scale)  # [H, V, 1]
    row = emit.permute(bias, [0, 2, 1])  # [H, 1, V]
    return emit(aten.add.Tensor, out, emit(aten.unsqueeze.default, row, 0))
