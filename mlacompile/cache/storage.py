"""What a user may ask a latent cache to store, checked, and the memory that answers it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlacompile.cache.store import (
    BlockScaledStore,
    LatentStore,
    PlainStore,
    TokenScaledStore,
    block_scaled_layout,
    plain_layout,
    token_scaled_layout,
)
from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import KVLayout

_FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_SCALES = ("block", "token")


@dataclass(frozen=True)
class Storage:
    """How latents are kept.

    dtype: a floating point dtype, an FP8 dtype, or None for what the model computes in.
    scales: "block" (one a 128 values) or "token" (one a latent); only FP8 has any. rope_dtype: of the rotary keys.
    """

    dtype: torch.dtype | None = None
    scales: str | None = None
    rope_dtype: torch.dtype | None = None

    @classmethod
    def parse(
        cls, dtype: str | torch.dtype | None, scales: str | None = None, rope_dtype: str | torch.dtype | None = None
    ) -> Storage:
        """From what a user wrote.

        Raises:
            UnsupportedInputError: an unknown name, or scales and a rope dtype where nothing is scaled.
        """
        stored = None if dtype is None else _dtype("dtype", dtype, _FLOATS | _FP8)
        if stored not in _FP8.values():
            if scales is not None or rope_dtype is not None:
                raise UnsupportedInputError(
                    f"dtype={dtype!r} with scales={scales!r} and rope_dtype={rope_dtype!r}: only an FP8 cache has "
                    f"scales and a dtype of its own for the rotary key; use dtype={' or '.join(map(repr, _FP8))}"
                )
            return cls(stored)
        if scales not in (None, *_SCALES):
            raise UnsupportedInputError(f"scales={scales!r}: expected one of {', '.join(map(repr, _SCALES))}")
        rope = torch.bfloat16 if rope_dtype is None else _dtype("rope_dtype", rope_dtype, _FLOATS | _FP8)
        if rope in _FP8.values() and rope != stored:
            raise UnsupportedInputError(f"rope_dtype={rope_dtype!r} with dtype={dtype!r}: expected the same FP8 type")
        return cls(stored, scales or "block", rope)

    def layout(self, rank: int, rope: int, compute: torch.dtype | None = None) -> KVLayout | None:
        """Bytes of a token; None when that depends on a dtype of the model that is not known yet."""
        if self.scales is not None:
            assert self.dtype is not None and self.rope_dtype is not None  # noqa: PT018
            scaled = block_scaled_layout if self.scales == "block" else token_scaled_layout
            return scaled(rank, rope, self.dtype, self.rope_dtype)
        dtype = self.dtype or compute
        return None if dtype is None else plain_layout(rank, rope, dtype)

    def allocate(
        self, batch: int, tokens: int, rank: int, rope: int, *, compute: torch.dtype, device: torch.device
    ) -> LatentStore:
        """Memory for ``batch`` sequences of ``tokens`` tokens of a model that computes in ``compute``."""
        if self.scales is None:
            storage = self.dtype or compute
            return PlainStore(batch, tokens, rank, rope, storage=storage, compute=compute, device=device)
        scaled = BlockScaledStore if self.scales == "block" else TokenScaledStore
        kinds = {"fp8": self.dtype, "rope_dtype": self.rope_dtype, "compute": compute}
        return scaled(batch, tokens, rank, rope, device=device, **kinds)


def _dtype(argument: str, value: str | torch.dtype, known: dict[str, torch.dtype]) -> torch.dtype:
    named = {str(d).removeprefix("torch."): d for d in known.values()} | known
    if isinstance(value, torch.dtype) and value in known.values():
        return value
    if isinstance(value, str) and value in named:
        return named[value]
    raise UnsupportedInputError(
        f"{argument}={value!r}: expected one of {', '.join(map(repr, known))}, or a torch dtype"
    )
