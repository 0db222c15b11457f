"""``mlacompile::absorb_and_write``: all that a step does between its projections and attention, in one launch.

    q_latent = fp8_linear(q_nope, w_uk)       a product for every head
    q_pe     = write_latents(…)               rotated, while the token is written into the cache

Neither needs the other, and both are short: one behind the other, most of their time is that of two launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import E4M3, fp8_linear_reference
from mlacompile.ops.write_latents import check_write, empty_queries, write_latents_reference


def absorb_and_write_reference(
    x: Tensor, weight: Tensor, weight_descale: Tensor, latent: Tensor, k_pe: Tensor | None, q_pe: Tensor | None,
    norm: Tensor | None, rotation: Tensor | None, slots: Tensor, c_cache: Tensor, k_cache: Tensor | None,
    descale: Tensor | None, *, eps: float, pairs: str, stored: torch.dtype, rope_stored: torch.dtype, group: int,
    scale_at: int, rope_at: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition: one, and the other."""
    turned = write_latents_reference(
        latent, k_pe, q_pe, norm, rotation, slots, c_cache, k_cache, descale, eps=eps, pairs=pairs, stored=stored,
        rope_stored=rope_stored, group=group, scale_at=scale_at, rope_at=rope_at,
    )  # fmt: skip
    return fp8_linear_reference(x, None, weight, weight_descale, x.dtype), turned


@torch.library.custom_op("mlacompile::absorb_and_write", mutates_args=("c_cache", "k_cache", "descale"))
def absorb_and_write(
    x: Tensor,
    weight: Tensor,
    weight_descale: Tensor,
    latent: Tensor,
    k_pe: Tensor | None,
    q_pe: Tensor | None,
    norm: Tensor | None,
    rotation: Tensor | None,
    slots: Tensor,
    c_cache: Tensor,
    k_cache: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """``fp8_linear`` of queries that are not quantized, with a weight for every head, and ``write_latents``.

    Args:
        x: ``[H, M, K]`` in 16 or 32 bits. weight, weight_descale: ``[H, N, K]`` in e4m3 and its scales.
        latent, …: as in ``write_latents``.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        The product ``[H, M, N]``, contiguous, in the dtype of x; and what ``write_latents`` returns.
    Raises:
        UnsupportedInputError: inputs that do not fit together, or a named kernel that cannot take them.
    """
    if x.dim() != 3 or weight.dim() != 3 or x.shape[::2] != weight.shape[::2] or weight.dtype != E4M3:
        raise UnsupportedInputError(
            f"absorb_and_write: got x {list(x.shape)} and a weight of {weight.dtype} {list(weight.shape)}; expected "
            f"[H, M, K] and {E4M3} [H, N, K]"
        )
    written = (latent, k_pe, q_pe, norm, rotation, slots, c_cache, k_cache, descale)
    check_write(*written, pairs=pairs, stored=stored, rope_stored=rope_stored, group=group)
    arguments = (x, weight, weight_descale, *written)
    settings = {"eps": eps, "pairs": pairs, "stored": stored, "rope_stored": rope_stored}
    settings |= {"group": group, "scale_at": scale_at, "rope_at": rope_at}
    kernel = registry.chosen("absorb_and_write", impl, *arguments, **settings)
    if kernel is None:
        return absorb_and_write_reference(*arguments, **settings)  # type: ignore[arg-type]
    return kernel.run(*arguments, **settings)  # type: ignore[no-any-return]


@absorb_and_write.register_fake
def _(
    x: Tensor, weight: Tensor, weight_descale: Tensor, latent: Tensor, k_pe: Tensor | None, q_pe: Tensor | None,
    norm: Tensor | None, rotation: Tensor | None, slots: Tensor, c_cache: Tensor, k_cache: Tensor | None,
    descale: Tensor | None, *, stored: torch.dtype, rope_stored: torch.dtype, eps: float = 0.0, pairs: str = "",
    group: int = 0, scale_at: int = 0, rope_at: int = 0, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_results(x, weight, latent, q_pe)


def empty_results(x: Tensor, weight: Tensor, latent: Tensor, q_pe: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the results."""
    return x.new_empty((*x.shape[:2], weight.shape[1])), empty_queries(latent, q_pe)
