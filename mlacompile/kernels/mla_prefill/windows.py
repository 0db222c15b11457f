"""Between which tokens a batch row's queries look, as the host has to know it to expand no more than that.

    read_bounds     device ─► host, on the way        asked for before a layer's projections
    windows_of      waits until it is there           long since, when its attention is to be launched

Waiting at once would let the device run dry: it has nothing to do until the host has the answer and launches again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: When what ``read_bounds`` sent to the host will have arrived there.
_ARRIVALS = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Window:
    """Tokens that a batch row's queries see, first <= t < end, and whether some in between are hidden by a mask."""

    first: int
    end: int
    hidden: bool


def read_bounds(mask: Tensor | None, start: Tensor | None, length: Tensor | None, *, batch: int, tokens: int) -> Tensor:
    """What mask, start and length let each batch row see: (first, end, hidden) as int64 ``[3, B]`` on the CPU.

    One of them is a tensor. Of a GPU it is sent on its way and not waited for: only ``windows_of`` may look at it.
    While a CUDA graph is captured nothing can be read: then all is -1.
    """
    device = next(x.device for x in (mask, start, length) if x is not None)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.full((3, batch), -1)
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    firsts = zeros if start is None else start.long().clamp(0, tokens)
    ends = zeros + tokens if length is None else length.long()
    holes = zeros
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] == 1):
        holes = holes + 1  # each query has a mask of its own
    elif mask is not None:
        index = torch.arange(tokens, device=device)
        within = (index >= firsts[:, None]) & (index < ends[:, None])
        seen = mask[:, 0] & within
        first = torch.where(seen, index, tokens).amin(1)
        inside = within & (index >= first[:, None])
        holes = (inside & ~seen).sum(1)
        firsts = torch.maximum(firsts, first)
    return _sent(torch.stack((firsts.expand(batch), ends.expand(batch), holes.expand(batch))))


def _sent(values: Tensor) -> Tensor:
    """Values on the CPU, or on their way to it."""
    if not values.is_cuda:
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    _ARRIVALS[host] = torch.cuda.current_stream(values.device).record_event()
    return host


def _arrived(host: Tensor) -> Tensor:
    """What was sent, when all of it is there."""
    arrival = _ARRIVALS.get(host)
    if arrival is not None:
        arrival.synchronize()
    elif torch.cuda.is_available() and host.is_pinned():  # another tensor with that memory
        torch.cuda.synchronize()
    return host


def windows_of(bounds: Tensor, tokens: int, *, causal: bool) -> list[Window] | None:
    """What each batch row sees, from what ``read_bounds`` made, or None where it could not read. One entry when all
    rows are alike."""
    found = []
    for first, end, hole in zip(*_arrived(bounds).tolist(), strict=True):
        if hole < 0:
            return None
        # A causal row ends where its last query stands; beyond the cache nobody can be looked at.
        fits = end <= tokens or not causal
        found.append(Window(min(first, tokens), min(end, tokens), bool(hole) or not fits))
    return found[:1] if len(set(found)) == 1 else found
