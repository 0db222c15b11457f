"""Small numbers in device memory by which programs of one launch wait for each other: zeros, and zeros again after it.

A kernel that puts its flags back needs no launch before it that clears them. Two launches at the same time must not
share any. On one stream there is one launch at a time; one that a CUDA graph records may be replayed on any stream,
beside anything, so it gets flags that nobody else ever gets.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORE = 1 << 20  # flags that are cleared at once, for launches that graphs record
_of_streams: dict[tuple[int, int], Tensor] = {}
_unused: dict[int, Tensor] = {}


def flags(device: torch.device, count: int) -> Tensor:
    """int32 zeros ``[count]`` for the next launch on the current stream, which leaves zeros behind."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        if index not in _unused or _unused[index].numel() < count:  # cleared by the graph, at each replay
            return torch.zeros(count, dtype=torch.int32, device=device)
        found, _unused[index] = _unused[index][:count], _unused[index][count:]
        return found
    if index not in _unused or _unused[index].numel() < STORE // 2:
        _unused[index] = torch.zeros(STORE, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # a graph may use them on another stream
    key = index, torch.cuda.current_stream(device).cuda_stream
    if key not in _of_streams or _of_streams[key].numel() < count:
        _of_streams[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _of_streams[key][:count]
