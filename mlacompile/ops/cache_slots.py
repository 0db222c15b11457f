"""``mlacompile::cache_slots``: where the next tokens of a static cache go, or an error when there is no room.

A cache that overflows must never be written, and must say so: an index that a kernel finds out of bounds ends a CPU
process, or says no more than that. As an op the check runs before the write that its result feeds, whoever compiled
the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import CacheFullError


def room_left(held: int, count: int, capacity: int) -> None:
    """Raise CacheFullError unless ``count`` more tokens fit beside ``held`` in ``capacity``."""
    if held + count > capacity:
        raise CacheFullError(
            f"the cache holds {held} of {capacity} tokens and was handed {count} more; expected at most "
            f"{capacity - held}. Nothing was written. Make it with a larger max_cache_len, or free it with reset() or "
            "crop(-tokens)."
        )


@torch.library.custom_op("mlacompile::cache_slots", mutates_args=())
def cache_slots(length: Tensor, count: int, capacity: int) -> Tensor:
    """Positions of the next tokens: ``length + arange(count)``.

    Args:
        length: how many tokens the cache holds, an integer tensor with one element. Reading it waits for its device.
        count: how many tokens come. capacity: how many the cache can hold.
    Returns:
        int64 ``[count]``.
    Raises:
        CacheFullError: they do not fit.
    """
    room_left(int(length), count, capacity)
    return torch.arange(count, device=length.device) + length


@cache_slots.register_fake
def _(length: Tensor, count: int, capacity: int) -> Tensor:
    return length.new_empty((count,), dtype=torch.int64)


def slots_on_device(length: Tensor, count: int, capacity: int) -> Tensor:
    """The same without waiting for the device: where they do not fit, the device stops with an assertion."""
    torch._assert_async(
        length + count <= capacity, "the latent cache is full: make it with a larger max_cache_len, or reset() it"
    )
    return torch.arange(count, device=length.device) + length
