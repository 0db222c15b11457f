"""``mlacompile::visible_bounds``: what of a cache the queries see, sent to the host once for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.kernels.mla_prefill.windows import read_bounds


# The host waits for it, which a CUDA graph cannot replay.
@torch.library.custom_op("mlacompile::visible_bounds", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def visible_bounds(mask: Tensor | None, start: Tensor | None, length: Tensor | None, batch: int, tokens: int) -> Tensor:
    """The argument ``bounds`` of ``mla_prefill`` for these of its arguments, of which at least one is a tensor.

    Returns:
        int64 ``[3, batch]`` on the CPU: the first token that any query of a batch row sees, the end, and whether any in
        between is hidden by a mask. -1 where nothing can be read, as a CUDA graph is being captured. Of tensors on a
        GPU it may still be under way: ``mla_prefill`` waits for it.
    """
    return read_bounds(mask, start, length, batch=batch, tokens=tokens)


@visible_bounds.register_fake
def _visible_bounds_fake(
    mask: Tensor | None, start: Tensor | None, length: Tensor | None, batch: int, tokens: int
) -> Tensor:
    return torch.empty(3, batch, dtype=torch.int64, device="cpu")
