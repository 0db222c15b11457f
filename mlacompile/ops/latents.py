"""Two ops by which a cache asks the compiler for what its arguments alone do not tell: the latents behind K and V.

    c_kv, k_pe = latent_of(k, v)                  what new keys and values were expanded from
    k, v       = expanded_again(c_kv, k_pe, k, v)  cached latents, expanded as the new keys and values were

Both stand in a graph only until ``passes/keep_latents.py`` has replaced them by what the graph itself shows. Run as
they are, they are an error: from numbers alone nobody can tell.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from mlacompile.errors import CacheError


def _unknown() -> NoReturn:
    raise CacheError(
        "a LatentCache was handed keys and values of every head, and only a graph that mlacompile compiles shows what "
        "they were expanded from. Compile all that uses the cache, the prompt too: model.forward = "
        "torch.compile(model.forward, backend='mlacompile'); or upgrade to transformers 5.15 or later, which caches "
        "latents; or use StaticCache."
    )


@torch.library.custom_op("mlacompile::latent_of", mutates_args=())
def latent_of(k: Tensor, v: Tensor, rank: int, rope: int) -> tuple[Tensor, Tensor]:
    """What keys ``[B, H, S, D]`` and values ``[B, H, S, V]`` were expanded from: ``[B, S, rank]``, ``[B, S, rope]``.

    Raises:
        CacheError: whenever it is run.
    """
    _unknown()


@latent_of.register_fake
def _(k: Tensor, v: Tensor, rank: int, rope: int) -> tuple[Tensor, Tensor]:
    batch, _, tokens, _ = k.shape
    return k.new_empty(batch, tokens, rank), k.new_empty(batch, tokens, rope)


@torch.library.custom_op("mlacompile::expanded_again", mutates_args=())
def expanded_again(c_kv: Tensor, k_pe: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Latents ``[B, T, R]`` and rotary keys ``[B, T, P]`` expanded as ``k`` and ``v`` were: ``[B, H, T, D]``,
    ``[B, H, T, V]``.

    Raises:
        CacheError: whenever it is run.
    """
    _unknown()


@expanded_again.register_fake
def _(c_kv: Tensor, k_pe: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, _, _ = k.shape
    tokens = c_kv.shape[1]
    return k.new_empty(batch, heads, tokens, k.shape[3]), v.new_empty(batch, heads, tokens, v.shape[3])
