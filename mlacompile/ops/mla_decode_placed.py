"""``mlacompile::mla_decode_placed``: ``mla_decode`` by its kernel for CPUs, as a compiled graph calls it.

The inputs were looked at when the graph was made, the kernel was chosen, and no graph of ours needs gradients. So
nothing of that is repeated in every call: this op is known to the dispatcher alone, without the layers that
``torch.library.custom_op`` puts around a body. Behind a layer's weights, which leave nothing else in the processor's
caches, such Python costs several times what a loop of it shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.kernels.mla_decode.cpu import mla_decode_cpu
from mlacompile.ops.mla_decode import last_dim_contiguous

_LIBRARY = torch.library.Library("mlacompile", "FRAGMENT")
_LIBRARY.define(
    "mla_decode_placed(Tensor q_latent, Tensor? q_pe, Tensor c_kv, Tensor? k_pe, Tensor? mask, Tensor? start, "
    "Tensor? length, Tensor? descale, *, float scale, bool causal) -> (Tensor, Tensor)"
)


def _placed(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    descale: Tensor | None,
    *,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    c_kv = last_dim_contiguous(c_kv)
    k_pe = None if k_pe is None else last_dim_contiguous(k_pe)
    tensors = (q_latent, q_pe, c_kv, k_pe, mask, start, length, None, descale)
    out, lse = mla_decode_cpu(*tensors, scale=scale, causal=causal)
    return out.contiguous(), lse.contiguous()  # the strides that graphs are compiled for


def _fake(q_latent: Tensor, *args: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return q_latent.new_empty(q_latent.shape), q_latent.new_empty(q_latent.shape[:3], dtype=torch.float32)


_LIBRARY.impl("mla_decode_placed", _placed, "CPU")
torch.library.register_fake("mlacompile::mla_decode_placed", _fake, lib=_LIBRARY)
