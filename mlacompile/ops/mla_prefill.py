"""``mlacompile::mla_prefill``: attention of many queries on a latent cache, expanded to heads a chunk of tokens at
a time.

The body below is the definition. Keys and values of a chunk are expanded, attended to and dropped; partial results
are
merged by their log-sum-exps (online softmax, arXiv 1805.02867), so what is alive at a time is the cache and one
chunk.
Where queries are so few that attention on the latent itself is cheaper, the op absorbs instead: with a number of
queries
that is known only at run time, that is where the choice is made.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry
from mlacompile.visible import visible_tokens


def mla_prefill_reference(
    q: Tensor,
    c_kv: Tensor,
    k_pe: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    *,
    scale: float,
    causal: bool,
    nope_at: int,
    pe_at: int,
    chunk: int,
    absorb_up_to: int = 0,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch: any device and dtype. Arguments as in :func:`mla_prefill`.

    Lower precisions are computed in float32, float64 in float64.
    """
    b, h, s, _ = q.shape
    t, n = c_kv.shape[1], w_uk.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    visible = visible_tokens(mask, start, length, causal, queries=s, tokens=t, device=c_kv.device)
    visible = None if visible is None else visible.expand(-1, -1, t)
    q_nope = q[..., nope_at : nope_at + n].to(compute)
    out = torch.zeros(b, h, s, w_uv.shape[1], dtype=compute, device=q.device)
    lse = torch.full((b, h, s), -math.inf, dtype=compute, device=q.device)
    for first in range(0, t, chunk):
        part = slice(first, min(first + chunk, t))
        latent, seen = c_kv[:, part].to(compute), None if visible is None else visible[:, :, part]
        if seen is not None:  # 0 * NaN is NaN: what no query sees must not reach a product
            latent = torch.where(seen.any(dim=1).unsqueeze(-1), latent, 0.0)
        scores = q_nope @ torch.einsum("btr,hnr->bhnt", latent, w_uk.to(compute))
        if k_pe is not None:
            q_pe = q[..., pe_at : pe_at + k_pe.shape[2]].to(compute)
            scores = scores + q_pe @ k_pe[:, None, part].to(compute).transpose(2, 3)
        scores = scores * scale
        if mask is not None and mask.dtype != torch.bool:
            added = mask.unsqueeze(1).to(compute)
            scores = scores + (added if mask.shape[2] == 1 else added[..., part])
        if seen is not None:
            scores = torch.where(seen.unsqueeze(1), scores, -math.inf)
        part_lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - torch.where(part_lse == -math.inf, 0.0, part_lse).unsqueeze(-1))
        values = torch.einsum("btr,hvr->bhtv", latent, w_uv.to(compute))
        share = torch.sigmoid(part_lse - lse).nan_to_num(0.0)
        out = torch.lerp(out, weights @ values, share.unsqueeze(-1))
        lse = torch.logaddexp(lse, part_lse)
    return out.to(q.dtype), lse.to(torch.float32)


# Reads lengths on the host, which a CUDA graph cannot replay: Inductor leaves such an op out of its recordings.
@torch.library.custom_op("mlacompile::mla_prefill", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def mla_prefill(
    q: Tensor,
    c_kv: Tensor,
    k_pe: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    bounds: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    nope_at: int,
    pe_at: int,
    chunk: int,
    absorb_up_to: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v with k = [w_uk · c_kv, k_pe] and v = w_uv · c_kv, a chunk of tokens at a time.

    Args:
        q: ``[B, H, S, D]``; its rows from ``nope_at`` on meet ``w_uk · c_kv``, those from ``pe_at`` on meet ``k_pe``.
        c_kv: ``[B, T, R]``. k_pe: ``[B, T, P]`` or None. w_uk: ``[H, N, R]``. w_uv: ``[H, V, R]``. Any strides.
        mask, start, length, causal: what a query sees, as ``mla_decode`` has it. What no query of a batch row sees
            never reaches a result, NaN or not.
        chunk: tokens expanded at a time. absorb_up_to: with no more queries than this, attend to the latent itself.
        bounds: what ``visible_bounds`` makes of mask, start and length, where it was read before; None: read now.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        out ``[B, H, S, V]`` in the dtype of q, in memory ``[B, S, H, V]``, and lse ``[B, H, S]`` in float32; 0 and
        -inf for a query that sees nothing.
    Raises:
        UnsupportedInputError: shapes that do not fit together, or a named kernel that cannot take the inputs.
    """
    _check(q, c_kv, k_pe, w_uk, w_uv, nope_at, pe_at, chunk)
    tensors = (q, c_kv, k_pe, w_uk, w_uv, mask, start, length)
    settings: dict[str, Any] = {"scale": scale, "causal": causal, "nope_at": nope_at, "pe_at": pe_at, "chunk": chunk}
    kernel = registry.chosen("mla_prefill", impl, *tensors, **settings)
    if kernel is not None:
        out, lse = kernel.run(*tensors, **settings, absorb_up_to=absorb_up_to, bounds=bounds)
        return _by_token(out), lse.to(torch.float32).contiguous()
    out, lse = mla_prefill_reference(*tensors, **settings)
    return _by_token(out), lse.contiguous()


def _by_token(out: Tensor) -> Tensor:
    """``[B, H, S, V]`` that lies in memory as ``[B, S, H, V]``, the way the output projection reads it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@mla_prefill.register_fake
def _mla_prefill_fake(
    q: Tensor,
    c_kv: Tensor,
    k_pe: Tensor | None,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    bounds: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    nope_at: int,
    pe_at: int,
    chunk: int,
    absorb_up_to: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check(q, c_kv, k_pe, w_uk, w_uv, nope_at, pe_at, chunk)
    b, h, s, _ = q.shape
    return q.new_empty(b, s, h, w_uv.shape[1]).transpose(1, 2), q.new_empty(b, h, s, dtype=torch.float32)


def _check(
    q: Tensor, c_kv: Tensor, k_pe: Tensor | None, w_uk: Tensor, w_uv: Tensor, nope_at: int, pe_at: int, chunk: int
) -> None:
    if q.dim() != 4 or c_kv.dim() != 3 or w_uk.dim() != 3 or w_uv.dim() != 3:
        shapes = ", ".join(str(list(x.shape)) for x in (q, c_kv, w_uk, w_uv))
        raise UnsupportedInputError(
            f"mla_prefill: got {shapes}; expected [B, H, S, D], [B, T, R], [H, N, R], [H, V, R]"
        )
    h, d, r = q.shape[1], q.shape[3], c_kv.shape[2]
    for name, w in (("w_uk", w_uk), ("w_uv", w_uv)):
        if w.shape[0] != h or w.shape[2] != r:
            raise UnsupportedInputError(f"mla_prefill: got {name} {list(w.shape)}; expected {h} heads and rank {r}")
    ends = {"nope": nope_at + w_uk.shape[1], "rope": pe_at + (0 if k_pe is None else k_pe.shape[2])}
    for name, end in ends.items():
        if end > d:
            raise UnsupportedInputError(f"mla_prefill: the {name} rows of q end at {end}, q has {d}")
    if chunk < 1:
        raise UnsupportedInputError(f"mla_prefill: chunk={chunk}; expected a positive number of tokens")
