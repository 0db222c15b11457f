"""Sizes of one latent attention, and the arithmetic on widths and cache bytes that follows from them.

Latent attention (MLA, arXiv 2405.04434) caches for each token one latent ``c_kv`` of ``rank`` values, shared by
all heads, and one rotary key ``k_pe`` of ``rope`` values. Keys and values of every head are linear in it:
``k[h] = [w_uk[h] @ c_kv, k_pe]`` with ``w_uk`` of ``[H, N, R]``, ``v[h] = w_uv[h] @ c_kv`` with ``w_uv`` of ``[H, V,
R]``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

#: Values that share one scale in a block-scaled cache, and along each side of a block of a scaled weight (the
#: DeepSeek-V3 recipe, arXiv 2412.19437, section 3.3.2).
SCALE_GROUP = 128
#: The parts of a token that lie in one run of bytes start at multiples of this, which a 16-byte load wants.
_ALIGNMENT = 16


def scale_groups(width: int, group: int = SCALE_GROUP) -> int:
    """Scales that ``width`` values have at one a group; the last group may be short."""
    return -(-width // group)


def filled_parts(count: int, parts: int) -> int:
    """How many parts of ``⌈count / parts⌉`` of so many things have any: at most ``parts``, and at least one."""
    return -(-count // max(1, -(-count // parts))) or 1


@dataclass(frozen=True)
class KVLayout:
    """How one token lies in the cache: bytes of its latent, its rotary key, the scales that go with them, padding.

    scale_at, rope_at: where, in one run of bytes that starts with the latent, the scales and the rotary key begin.
    None: the parts lie in arrays of their own.
    """

    name: str
    latent_bytes: int
    rope_bytes: int
    scale_bytes: int = 0
    pad_bytes: int = 0
    scale_at: int | None = None
    rope_at: int | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token of one layer takes."""
        return self.latent_bytes + self.rope_bytes + self.scale_bytes + self.pad_bytes

    @classmethod
    def in_one_run(cls, name: str, latent_bytes: int, rope_bytes: int, scale_bytes: int) -> KVLayout:
        """Latent, scales, rotary key, one after the other. 512 one-byte values with four float32 scales and 64 bf16
        rope values take 656 bytes: the layout of FlashMLA's FP8 cache."""
        scale_at = _aligned(latent_bytes)
        rope_at = _aligned(scale_at + scale_bytes)
        total = _aligned(rope_at + rope_bytes)
        pad = total - latent_bytes - scale_bytes - rope_bytes
        return cls(name, latent_bytes, rope_bytes, scale_bytes, pad, scale_at, rope_at)

    def __str__(self) -> str:
        return f"{self.name}, {self.bytes_per_token} B/token"


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


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
