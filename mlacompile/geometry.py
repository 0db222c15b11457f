"""Sizes of one latent attention, and the arithmetic on widths and cache bytes that follows from them.

Latent attention (MLA, arXiv 2405.04434) caches for each token one latent ``c_kv`` of ``rank`` values, shared by
all heads, and one rotary key ``k_pe`` of ``rope`` values. Keys and values of every head are linear in it:
``k[h] = [w_uk[h] @ c_kv, k_pe]`` with ``w_uk`` of ``[H, N, R]``, ``v[h] = w_uv[h] @ c_kv`` with ``w_uv`` of ``[H, V,
R]``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class KVLayout:
    """How one token lies in the cache: bytes of its latent, its rotary key, and the scales that belong to it."""

    name: str
    latent_bytes: int
    rope_bytes: int
    scale_bytes: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token of one layer takes."""
        return self.latent_bytes + self.rope_bytes + self.scale_bytes

    def __str__(self) -> str:
        return f"{self.name}, {self.bytes_per_token} B/token"


@dataclass(frozen=True)
class MLAGeometry:
    """Heads and widths of one latent attention (all in elements)."""

    heads: int
    rank: int
    nope: int
    rope: int
    v: int

    @property
    def latent_width(self) -> int:
        """Values cached for one token: rank + rope."""
        return self.rank + self.rope

    @property
    def expanded_width(self) -> int:
        """Values one token takes once keys and values of every head are written out."""
        return self.heads * (self.nope + self.rope + self.v)

    def layout(self, dtype_name: str, itemsize: int) -> KVLayout:
        """The plain layout: latent and rotary key stored in one dtype, no scales."""
        return KVLayout(dtype_name, self.rank * itemsize, self.rope * itemsize)

    def to_dict(self) -> dict[str, int]:
        """The five sizes by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.heads} heads, rank {self.rank}, nope {self.nope}, rope {self.rope}, v {self.v}"
