"""Inputs of ``write_latents`` for tests and benchmarks: every kind of cache, and what two writes may differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlacompile.cache.store import block_scaled_layout
from mlacompile.kernels.write_latents.rows import destinations

#: Two arrays as of a StaticCache, one of both parts, 656 bytes a token and the like, one scale a token.
CACHES = ("static", "fused", "block", "token", "block e5m2")


@dataclass(frozen=True)
class WriteCase:
    """Sizes of one write. heads: 0 for no queries. pairs: "" for no rotation."""

    batch: int
    tokens: int
    rank: int
    rope: int
    heads: int
    kind: str = "static"
    pairs: str = "interleaved"
    norm: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    capacity: int = 11
    seed: int = 0


@dataclass(frozen=True)
class Write:
    """Arguments and settings of one call; the caches in it are written."""

    arguments: tuple[Any, ...]
    settings: dict[str, Any]

    @property
    def caches(self) -> list[Tensor]:
        """The arrays that are written."""
        return [x for x in self.arguments[6:] if x is not None]


def make_write(case: WriteCase) -> Write:
    """Random inputs, parts of larger tensors as projections leave them, and caches full of ones."""
    meta = case.device == "meta"
    generator = None if meta else torch.Generator(case.device).manual_seed(case.seed)

    def random(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device).to(dtype)

    b, s, r, p, h = case.batch, case.tokens, case.rank, case.rope, case.heads
    joint = random(b, s, r + p)
    latent, k_pe = joint.split([r, p], dim=-1)
    q_pe = random(b, s, h, 16 + p).transpose(1, 2)[..., 16:] if h and case.pairs else None
    rotation = random(2, b, s, p, dtype=torch.float32) if case.pairs else None
    slots = torch.arange(s, device=case.device).flip(0) + (case.capacity - s) // 2
    caches, settings = _caches(case)
    settings |= {"eps": 1e-6, "pairs": case.pairs}
    return Write((latent, k_pe, q_pe, random(r) if case.norm else None, rotation, slots, *caches), settings)


def _caches(case: WriteCase) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    def ones(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=case.device)

    b, t, r, p, dtype = case.batch, case.capacity, case.rank, case.rope, case.dtype
    rope = torch.bfloat16 if case.kind not in ("static", "fused") else dtype
    settings: dict[str, Any] = {"stored": dtype, "rope_stored": rope, "group": 0, "scale_at": 0, "rope_at": 0}
    if case.kind == "static":
        return (ones(b, 1, t, r, dtype=dtype), ones(b, 1, t, p, dtype=dtype), None), settings
    if case.kind == "fused":
        return (ones(b, t, r + p, dtype=dtype), None, None), settings | {"rope_at": r * dtype.itemsize}
    fp8 = torch.float8_e5m2 if "e5m2" in case.kind else torch.float8_e4m3fn
    settings |= {"stored": fp8, "group": r if case.kind == "token" else 128}
    if case.kind == "token":
        latents, keys = ones(b, t, r, dtype=torch.uint8), ones(b, t, 2 * p, dtype=torch.uint8)
        return (latents, keys, ones(b, t, 1, dtype=torch.float32)), settings
    layout = block_scaled_layout(r, p, fp8, rope)
    settings |= {"scale_at": layout.scale_at, "rope_at": layout.rope_at}
    return (ones(b, t, layout.bytes_per_token, dtype=torch.uint8), None, None), settings


def differences(got: Write, q: Tensor | None, want: Write, exact: Tensor | None) -> str:
    """What two writes of the same values by different orders of float32 sums differ in beyond that; "" if in nothing.

    Values differ by a few roundings in float32 and one of what they are stored in; a scale by a few in float32.
    """
    latent, k_pe = want.arguments[:2]
    keywords = {k: v for k, v in want.settings.items() if k not in ("eps", "pairs")}
    sizes = latent.shape[-1], k_pe.shape[-1]
    views = [destinations(*(*x.arguments[6:9], *sizes), **keywords) for x in (got, want)]
    pairs = dict(zip(("latents", "keys", "scales"), zip(*views, strict=True), strict=True))
    pairs["queries"] = (q, exact)
    group = want.settings["group"]
    for name, (one, other) in pairs.items():
        if one is None or other is None:
            continue
        coarse = torch.finfo(other.dtype).eps
        one, other = one.double(), other.double()
        allowed = (coarse + 64 * 2.0**-24) * other.abs() + 64 * 2.0**-24
        if name == "scales":
            allowed = 64 * 2.0**-24 * other.abs()
        if name == "latents" and group:  # the smallest of FP8 lie as far apart as its denormals
            smallest = torch.finfo(want.settings["stored"]).smallest_normal
            allowed = allowed + coarse * smallest
        same = (one - other).abs() <= allowed
        if not bool((same | (one.isnan() & other.isnan()) | (one == other)).all()):
            return f"{name} differ by {(one - other).abs().max():.3g}"
    return ""
