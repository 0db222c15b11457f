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

_LIBRARY = torch.library.Library("mlacompile", "FRAGMENT")
_LIBRARY.define(
    "mla_decode_placed(Tensor q_latent, Tensor? q_pe, Tensor c_kv, Tensor? k_pe, Tensor? mask, Tensor? start, "
    "Tensor? length, Tensor? descale, *, float scale, bool causal) -> (Tensor, Tensor)"
)


def _placed(*tensors: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    *others, descale = tensors
    out, lse = mla_decode_cpu(*others, None, descale, scale=scale, causal=causal)  # type: ignore[arg-type,misc]
    return out.contiguous(), lse.contiguous()  # the strides that graphs are compiled for


def _fake(q_latent: Tensor, *args: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return q_latent.new_empty(q_latent.shape), q_latent.new_empty(q_latent.shape[:3], dtype=torch.float32)


_LIBRARY.impl("mla_decode_placed", _placed, "CPU")
torch.library.register_fake("mlacompile::mla_decode_placed", _fake, lib=_LIBRARY)
