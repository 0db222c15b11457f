"""``mlacompile::write_latents``: what lies between the projections of a decode step and its attention, in one pass.

    c_kv   = rms(latent) · norm                     written into the cache, quantized where the cache is FP8
    k_pe   = rotated(k_pe)                          written beside it
    q_pe   = rotated(q_pe)                          returned

Each of these is a few kilobytes: apart they cost launches, not memory. A rotation is given by its factors, as anything
that makes each value of a pair of values:

    out[j] = rotation[0, j] · x[first(j)] + rotation[1, j] · x[second(j)]

``pairs`` says which those are. With W = P / 2 pairs: "interleaved" (2i, 2i + 1 stay where they are), "halves" (i and
i + W stay), "interleaved to halves" (2i and 2i + 1 go to i and i + W, as DeepSeek-V3 has it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry
from mlacompile.kernels.write_latents.rows import destinations
from mlacompile.ops.fp8_quantize import FP8_DTYPES, fp8_quantize_reference

PAIRS = ("interleaved", "halves", "interleaved to halves")


def rotated(x: Tensor, rotation: Tensor, pairs: str) -> Tensor:
    """x ``[B, H, S, P]`` rotated by the factors ``[2, B, S, P]``, in their dtype or a wider one."""
    first, second = paired(x, pairs)
    return first * rotation[0].unsqueeze(1) + second * rotation[1].unsqueeze(1)


def paired(x: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """The first and the second value of the pair that makes each value, both in the shape of x."""
    half = x.shape[-1] // 2
    if pairs == "halves":
        halves = x[..., :half], x[..., half:]
        return tuple(torch.cat((part, part), dim=-1) for part in halves)  # type: ignore[return-value]
    parts = x[..., ::2], x[..., 1::2]
    if pairs == "interleaved":
        return tuple(part.repeat_interleave(2, dim=-1) for part in parts)  # type: ignore[return-value]
    return tuple(torch.cat((part, part), dim=-1) for part in parts)  # type: ignore[return-value]


def write_latents_reference(
    latent: Tensor, k_pe: Tensor | None, q_pe: Tensor | None, norm: Tensor | None, rotation: Tensor | None,
    slots: Tensor, c_cache: Tensor, k_cache: Tensor | None = None, descale: Tensor | None = None,
    *, eps: float, pairs: str, stored: torch.dtype, rope_stored: torch.dtype, group: int, scale_at: int, rope_at: int,
) -> Tensor:  # fmt: skip
    """The definition, in float32 or wider, rounded once at the end."""
    compute = torch.promote_types(latent.dtype, torch.float32)
    rope = 0 if k_pe is None else k_pe.shape[-1]
    into, keys, scales = destinations(
        c_cache, k_cache, descale, latent.shape[-1], rope,
        stored=stored, rope_stored=rope_stored, group=group, scale_at=scale_at, rope_at=rope_at,
    )  # fmt: skip
    row = latent.to(compute)
    if norm is not None:
        row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps) * norm.to(compute)
    if scales is not None:
        row, factors = fp8_quantize_reference(row, group, stored)
        scales.index_copy_(1, slots, factors)
        into, row = into.view(torch.uint8), row.view(torch.uint8)  # PyTorch has no index_copy_ for FP8
    into.index_copy_(1, slots, row.to(into.dtype))
    if keys is not None and k_pe is not None:
        key = k_pe.to(compute)
        key = key if rotation is None else rotated(key.unsqueeze(1), rotation, pairs)[:, 0]
        keys.index_copy_(1, slots, key.to(rope_stored))
    if q_pe is None or rotation is None:
        return latent.new_empty(0)
    return rotated(q_pe.to(compute), rotation, pairs).to(q_pe.dtype).contiguous()


@torch.library.custom_op("mlacompile::write_latents", mutates_args=("c_cache", "k_cache", "descale"))
def write_latents(
    latent: Tensor,
    k_pe: Tensor | None,
    q_pe: Tensor | None,
    norm: Tensor | None,
    rotation: Tensor | None,
    slots: Tensor,
    c_cache: Tensor,
    k_cache: Tensor | None,  # no defaults: PyTorch 2.11 counts written tensors among the arguments that were passed
    descale: Tensor | None,
    *,
    stored: torch.dtype,
    rope_stored: torch.dtype,
    eps: float = 0.0,
    pairs: str = "",
    group: int = 0,
    scale_at: int = 0,
    rope_at: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Write the latents and rotary keys of a step into a cache in place, and rotate its queries.

    Args:
        latent: ``[B, S, R]``, before its norm if there is one. norm: ``[R]``, the weight of an RMS norm with ``eps``.
        k_pe: ``[B, S, P]``; None: nothing is written beside latents. q_pe: ``[B, H, S, P]``; None: there are none.
        rotation: float32 ``[2, B, S, P]``, the factors of ``pairs``, of keys and queries; None: keys are written as
            they are.
        slots: int64 ``[S]``, the rows of every sequence that are written, all different and all below T.
        c_cache: ``[B, T, ·]`` or ``[B, 1, T, ·]``: rows of latents in the dtype ``stored``, or of bytes.
        k_cache: the same for rotary keys in ``rope_stored``; None: they lie in the rows of ``c_cache``, from byte
            ``rope_at`` on. descale: float32 ``[B, T, ⌈R / group⌉]``; None: they lie there too, from byte ``scale_at``.
        group: values of a latent that share a scale, with ``stored`` in FP8; 0: latents are not scaled.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        Rotated queries ``[B, H, S, P]``, contiguous, in the dtype of q_pe; without queries an empty tensor.
        Everything is computed in float32 and rounded once, scales and quotients as in ``fp8_quantize``.
    Raises:
        UnsupportedInputError: inputs that do not fit together, or a named kernel that cannot take them.
    """
    arguments = (latent, k_pe, q_pe, norm, rotation, slots, c_cache, k_cache, descale)
    settings = {"eps": eps, "pairs": pairs, "stored": stored, "rope_stored": rope_stored}
    settings |= {"group": group, "scale_at": scale_at, "rope_at": rope_at}
    check_write(*arguments, pairs=pairs, stored=stored, rope_stored=rope_stored, group=group)
    kernel = registry.chosen("write_latents", impl, *arguments, **settings)
    if kernel is None:
        return write_latents_reference(*arguments, **settings)  # type: ignore[arg-type]
    return kernel.run(*arguments, **settings)  # type: ignore[no-any-return]


@write_latents.register_fake
def _(
    latent: Tensor, k_pe: Tensor | None, q_pe: Tensor | None, norm: Tensor | None, rotation: Tensor | None,
    slots: Tensor, c_cache: Tensor, k_cache: Tensor | None, descale: Tensor | None,
    *, stored: torch.dtype, rope_stored: torch.dtype, eps: float = 0.0, pairs: str = "", group: int = 0,
    scale_at: int = 0, rope_at: int = 0, impl: str = "auto",
) -> Tensor:  # fmt: skip
    return empty_queries(latent, q_pe)


def empty_queries(latent: Tensor, q_pe: Tensor | None) -> Tensor:
    """Room for rotated queries, or nothing: there are none without a rotation."""
    return latent.new_empty(0) if q_pe is None else q_pe.new_empty(q_pe.shape)


def check_write(
    latent: Tensor, k_pe: Tensor | None, q_pe: Tensor | None, norm: Tensor | None, rotation: Tensor | None,
    slots: Tensor, c_cache: Tensor, k_cache: Tensor | None, descale: Tensor | None,
    *, pairs: str, stored: torch.dtype, rope_stored: torch.dtype, group: int,
) -> None:  # fmt: skip
    if latent.dim() != 3 or slots.shape != latent.shape[1:2] or slots.dtype != torch.int64:
        raise UnsupportedInputError(
            f"write_latents: got latent {list(latent.shape)} and slots {slots.dtype} {list(slots.shape)}; "
            "expected [B, S, R] and int64 [S]"
        )
    batch, tokens, rank = latent.shape
    if norm is not None and norm.shape != (rank,):
        raise UnsupportedInputError(f"write_latents: got norm {list(norm.shape)}; expected [{rank}]")
    if k_pe is None and (q_pe is not None or rotation is not None):
        raise UnsupportedInputError("write_latents: got queries or a rotation without k_pe; expected all or none")
    if q_pe is not None and rotation is None:
        raise UnsupportedInputError("write_latents: got queries and no rotation; leave them out")
    if k_pe is not None:
        rope = k_pe.shape[-1]
        queries = q_pe is None or (q_pe.dim() == 4 and (q_pe.shape[0], *q_pe.shape[2:]) == (batch, tokens, rope))
        factors = rotation is None or (rotation.shape == (2, batch, tokens, rope) and rotation.dtype == torch.float32)
        if k_pe.shape != (batch, tokens, rope) or not queries or not factors:
            given = [None if x is None else list(x.shape) for x in (k_pe, q_pe, rotation)]
            raise UnsupportedInputError(
                f"write_latents: got k_pe, q_pe and rotation {given}; expected "
                f"[{batch}, {tokens}, P], [{batch}, H, {tokens}, P] and float32 [2, {batch}, {tokens}, P]"
            )
        if rotation is not None and (pairs not in PAIRS or rope % 2):
            raise UnsupportedInputError(
                f"write_latents: got pairs={pairs!r} of {rope} values; expected an even number and one of "
                f"{', '.join(map(repr, PAIRS))}"
            )
    if (group > 0) != (stored in FP8_DTYPES) or rope_stored in FP8_DTYPES:
        raise UnsupportedInputError(
            f"write_latents: got a group of {group} with latents in {stored} and keys in {rope_stored}; expected "
            "scaled latents in FP8, or others without scales, and keys in 16 bits or more"
        )
    for name, cache in (("c_cache", c_cache), ("k_cache", k_cache), ("descale", descale)):
        if cache is None:
            continue
        rows = cache.shape[1:2] if cache.dim() == 4 else ()
        if cache.dim() not in (3, 4) or cache.shape[0] != batch or rows not in ((), (1,)):
            raise UnsupportedInputError(
                f"write_latents: got {name} {list(cache.shape)}; expected [{batch}, T, ·] or [{batch}, 1, T, ·]"
            )
