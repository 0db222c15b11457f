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
from mlacompile.passes.axes import BATCH
from mlacompile.passes.cone import Latent
from mlacompile.passes.emit import Emitter
from mlacompile.passes.hoist import HOISTED_IF_TRACKED
from mlacompile.passes.maps import Computed, Plain, UpProjection, WeightView
from mlacompile.passes.recognize import MLASite, mask_without_heads
from mlacompile.passes.unit import unit_response
from mlacompile.passes.views import View
from mlacompile.passes.visibility import emit_arguments, understand

aten = torch.ops.aten


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
    emit.known = {BATCH: emit.size(attention.q, 0)}
    maps = Maps(emit, site)
    q = emit.cast(attention.q, site.dtype)
    q_latent = _rows(emit, q, found.k_rows)
    q_latent = _up(emit, q_latent, maps.of(found.w_uk, found.c_kv, found.k_rows), transposed=False)
    q_latent = scaled(emit, q_latent, found.w_uk)
    q_pe, k_pe = None, None
    if site.k_pe is not None and found.k_pe is not None:
        q_pe = _rows(emit, q, found.pe_rows)
        q_pe = _up(emit, q_pe, maps.of(found.w_pe, found.k_pe, found.pe_rows), transposed=False)
        q_pe = scaled(emit, q_pe, found.w_pe)
        k_pe = latent_of(emit, site, site.k_pe)
    c_kv = latent_of(emit, site, site.c_kv)
    seen = emit_arguments(emit, understand(attention), q)
    decode = emit(
        torch.ops.mlacompile.mla_decode.default,
        *(q_latent, q_pe, c_kv, k_pe, seen.mask, seen.start, seen.length),
        scale=attention.scale,
        causal=seen.causal,
        impl=options.kernel,
    )
    out = emit(operator.getitem, decode, 0)
    out = _up(emit, out, maps.of(found.w_uv, found.c_kv, found.v_rows), transposed=True)
    out = scaled(emit, out, found.w_uv)
    if found.v_bias is not None:
        out = add_bias(emit, maps.v_bias(found.v_bias), found.v_bias, out)
    if attention.sink is not None:
        lse = emit(aten.unsqueeze.default, emit(operator.getitem, decode, 1), -1)
        if found.k_bias:  # the latent knows nothing of it, and the sink has none
            shift = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, q, maps.k_bias()), [-1], True)
            lse = emit(aten.add.Tensor, lse, emit(aten.mul.Tensor, shift, attention.scale))
        out = _beside_sink(emit, out, lse, attention.sink)
    finish(emit, site, out)
    return decode


def finish(emit: Emitter, site: MLASite, out: Node) -> None:
    """Put the output of a site, ``[B, H, S, V]``, in the place of its attention op's."""
    first, rows = site.probe.v_rows
    out = emit.cast(out, site.attention.node.meta["val"].dtype)
    if rows != site.v_size:
        out = emit(aten.constant_pad_nd.default, out, [first, site.v_size - first - rows])
    # What follows was traced on contiguous attention outputs, and views them; Inductor fuses this copy away.
    out = emit(aten.clone.default, out, memory_format=torch.contiguous_format)
    site.attention.node.replace_all_uses_with(out)


class Maps:
    """The up-projections of a site as nodes ``[H, rows, width]``: views of live weights where they are that, else what
    the cone makes of unit latents."""

    def __init__(self, emit: Emitter, site: MLASite) -> None:
        self.emit, self.site = emit, site
        self._known: dict[int, dict[Node, Node]] = {}

    def of(self, found: UpProjection, latent: int, rows: tuple[int, int]) -> Node | None:
        """None for a latent that is used as it is."""
        if isinstance(found, Plain):
            return None
        if isinstance(found, WeightView):
            return self._view(found)
        emit, width = self.emit, self.site.cone.latents[latent].width
        value = self._unit(latent, found)
        zero = emit(aten.slice.Tensor, value, 2, width, width + 1)
        maps = emit(aten.sub.Tensor, emit(aten.slice.Tensor, value, 2, 0, width), zero)
        maps = emit.permute(_rows(emit, emit(aten.select.int, maps, 0, 0), rows, dim=2), [0, 2, 1])
        maps = emit(aten.slice.Tensor, maps, 0, 0, 1) if found.shared else maps
        return _kept(emit(aten.clone.default, maps, memory_format=torch.contiguous_format))

    def v_bias(self, found: WeightView | Computed) -> Node:
        """``[H, V, 1]``."""
        if isinstance(found, WeightView):
            return self._view(found)
        emit, latent = self.emit, self.site.probe.c_kv
        width = self.site.cone.latents[latent].width
        zero = emit(aten.slice.Tensor, self._unit(latent, found), 2, width, width + 1)
        rows = _rows(emit, emit(aten.select.int, zero, 0, 0), self.site.probe.v_rows, dim=2)
        return emit.permute(rows, [0, 2, 1])

    def k_bias(self) -> Node:
        """``[1, H, 1, D]``."""
        latent = self.site.probe.c_kv
        width = self.site.cone.latents[latent].width
        return self.emit(aten.slice.Tensor, self._unit(latent, Computed("k")), 2, width, width + 1)

    def _view(self, found: WeightView) -> Node:
        weight = self.site.leaf(self.site.cone.weights[found.leaf])[0]
        weight = weight if weight.op == "placeholder" else _kept(weight)
        if weight.meta["val"].dtype is not self.site.dtype:
            weight = _kept(self.emit.cast(weight, self.site.dtype))
        return emit_view(self.emit, weight, found.view)

    def _unit(self, latent: int, found: Computed) -> Node:
        """K or V ``[1, H, width + 1, rows]`` for every unit vector of a latent, and for zero."""
        if latent not in self._known:
            self._known[latent] = unit_response(self.emit, self.site, latent)
        attention = self.site.attention
        return self.emit.cast(self._known[latent][attention.k if found.of == "k" else attention.v], self.site.dtype)


def _kept(node: Node) -> Node:
    """A map that is computed from weights, and is to be computed once a version of them."""
    node.meta[HOISTED_IF_TRACKED] = True
    return node


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


def latent_of(emit: Emitter, site: MLASite, latent: Latent) -> Node:
    """``[B, T, width]``, of the tokens attended to."""
    node, dims = site.leaf(latent.node)
    whole = emit.narrow(emit.arrange(node, dims, "BTD"), 2, latent.start, latent.width)
    return emit.cast(_first_tokens(emit, whole, site.attention.prefix), site.dtype)


def _rows(emit: Emitter, x: Node, rows: tuple[int, int], dim: int = 3) -> Node:
    return emit.narrow(x, dim, *rows)


def scaled(emit: Emitter, x: Node, found: UpProjection) -> Node:
    factor = 1.0 if isinstance(found, Computed) else found.scale
    return x if factor == 1.0 else emit(aten.mul.Tensor, x, factor)


def _beside_sink(emit: Emitter, out: Node, lse: Node, sink: Node) -> Node:
    """The share of the softmax that a sink leaves to the tokens is ``sigmoid(lse - sink)``."""
    less = emit(aten.sub.Tensor, lse, sink)
    share = emit(aten._to_copy.default, emit(aten.sigmoid.default, less), dtype=out.meta["val"].dtype)
    return emit(aten.mul.Tensor, out, share)


def _up(emit: Emitter, x: Node, weight: Node | None, *, transposed: bool) -> Node:
    """Per-head product ``[B, H, S, M] · [H or 1, M, N] → [B, H, S, N]`` as one batched product over heads."""
    if weight is None:
        return x
    batch, heads, queries = (emit.size(x, d) for d in range(3))
    by_head = emit(aten.reshape.default, emit.permute(x, [1, 0, 2, 3]), [heads, -1, emit.size(x, 3)])
    right = emit.permute(weight, [0, 2, 1]) if transposed else weight
    if right.meta["val"].shape[0] != heads:
        right = emit(aten.expand.default, right, [heads, -1, -1])
    product = emit(aten.bmm.default, by_head, right)
    shaped = emit(aten.reshape.default, product, [heads, batch, queries, emit.size(product, 2)])
    return emit.permute(shaped, [1, 0, 2, 3])


def add_bias(emit: Emitter, bias: Node, found: WeightView | Computed, out: Node) -> Node:
    bias = scaled(emit, bias, found)  # [H, V, 1]
    row = emit.permute(bias, [0, 2, 1])  # [H, 1, V]
    return emit(aten.add.Tensor, out, emit(aten.unsqueeze.default, row, 0))
