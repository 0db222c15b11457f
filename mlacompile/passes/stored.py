"""What the cache behind a latent really stores: walk from the latent back to the array that tokens are written to.

A latent that is read through a cast or a dequantization is one thing to attention and another in memory; the report
speaks of memory.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

import mlacompile.ops.fp8_quantize  # noqa: F401  (registers the op that is looked for)
from mlacompile.geometry import KVLayout
from mlacompile.passes.axes import shape_of
from mlacompile.passes.pull import REARRANGE
from mlacompile.passes.recognize import MLASite

aten = torch.ops.aten
_DEQUANTIZE = torch.ops.mlacompile.fp8_dequantize.default
_READ = {*REARRANGE, aten.slice.Tensor, aten.select.int, aten._to_copy.default, aten.view.dtype, aten.expand.default}
#: What a cache that tokens were just written to looks like.
_WRITTEN = {aten.index_copy.default, aten.index_put.default, aten.slice_scatter.default, aten.cat.default}


def stored_layout(site: MLASite) -> KVLayout:
    """Bytes a token takes in the cache that a site reads, as far as the graph shows it."""
    latent = _Read.of(site.c_kv.node)
    plain = site.geometry.layout(_name(latent.dtype), latent.dtype.itemsize)
    rope = None if site.k_pe is None else _Read.of(site.k_pe.node)
    if latent.scales is None and (rope is None or rope.dtype == latent.dtype):
        return plain
    rope_bytes = 0 if rope is None else site.geometry.rope * rope.dtype.itemsize
    scales = (latent.scales or 0) + (0 if rope is None else rope.scales or 0)
    name = _name(latent.dtype)
    if latent.scales:
        name += " with a scale a token" if latent.scales == 1 else f" with {latent.scales} scales a token"
    if rope is not None and rope.dtype != latent.dtype:
        name += f", rope {_name(rope.dtype)}"
    parts = site.geometry.rank * latent.dtype.itemsize + rope_bytes + 4 * scales
    together = rope is not None and rope.array is latent.array
    pad = latent.bytes_per_row - parts if together and latent.bytes_per_row > parts else 0
    return KVLayout(name, plain.latent_bytes, rope_bytes, 4 * scales, pad)


class _Read:
    """How a tensor is read from a cache: the array, the dtype of its values there, and scales a token."""

    def __init__(self, array: Node, dtype: torch.dtype, scales: int | None) -> None:
        self.array, self.dtype, self.scales = array, dtype, scales

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row of the array."""
        value = self.array.meta["val"]
        return int(value.shape[-1]) * value.dtype.itemsize

    @classmethod
    def of(cls, latent: Node) -> _Read:
        """Walk back to what was written to, or to an input. Where the walk ends elsewhere the latent is no cache."""
        node, scales = latent, None
        dtype = node.meta["val"].dtype
        while node.op == "call_function" and node.target not in _WRITTEN:
            if node.target is _DEQUANTIZE:
                scales = int(shape_of(node.args[1])[-1])  # type: ignore[arg-type,index]
                dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
            elif node.target is aten._to_copy.default and scales is None:
                dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
            elif node.target not in _READ and node.target is not operator.getitem:
                return cls(latent, latent.meta["val"].dtype, None)
            node = node.args[0]  # type: ignore[assignment]
        return cls(node, dtype, scales)


def _name(dtype: torch.dtype) -> str:
    short = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
    return short.get(dtype, str(dtype).removeprefix("torch."))
