"""``mlacompile::mla_decode``: attention of a few queries straight on a latent cache that all heads share.

The body below is the definition; kernels stand beside it in ``mlacompile.kernels`` and must agree with it. A cached
token is one latent ``c_kv`` (key *and* value) and one rotary key ``k_pe``; queries arrive already absorbed
(``q_nope @ w_uk``), and the output leaves in latent space, to be multiplied by ``w_uv``. DeepSeek-V2, arXiv 2405.04434,
section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels import registry
from mlacompile.kernels.mla_decode.supports import last_dim_contiguous
from mlacompile.ops.fp8_quantize import FP8_DTYPES, fp8_dequantize_reference
from mlacompile.visible import visible_tokens

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mla_decode_reference(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    block_table: Tensor | None = None,
    descale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch: any device and dtype, traceable, batched products on the cache, no expanded copy.

    Shapes as in :func:`mla_decode`. Lower precisions are computed in float32, float64 in float64.
    """
    b, h, s, r = q_latent.shape
    if descale is not None:
        c_kv, k_pe = dequantize_cache(c_kv, k_pe, descale, torch.promote_types(q_latent.dtype, torch.float32))
    if block_table is not None:
        c_kv = gather_pages(c_kv, block_table)
        k_pe = None if k_pe is None else gather_pages(k_pe, block_table)
    t = c_kv.shape[1]
    compute = torch.promote_types(q_latent.dtype, torch.float32)
    visible = visible_tokens(mask, start, length, causal, queries=s, tokens=t, device=c_kv.device)

    values = c_kv.to(compute)
    if visible is not None:  # 0 * NaN is NaN: a row that no query sees must not reach the product with P
        values = torch.where(visible.any(dim=1).unsqueeze(-1), values, 0.0)
    scores = torch.bmm(q_latent.reshape(b, h * s, r).to(compute) * scale, values.transpose(1, 2))
    if q_pe is not None and k_pe is not None:
        rope_rows = q_pe.reshape(b, h * s, q_pe.shape[3]).to(compute) * scale
        scores = scores + torch.bmm(rope_rows, k_pe.to(compute).transpose(1, 2))
    scores = scores.view(b, h, s, t)
    if visible is not None:
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + mask.unsqueeze(1).to(compute)
        scores = torch.where(visible.unsqueeze(1), scores, -math.inf)

    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse))  # sees nothing: exp(-inf - 0) = 0, so out = 0
    out = torch.bmm(weights.view(b, h * s, t), values).view(b, h, s, r)
    return out.to(q_latent.dtype), lse.squeeze(-1).to(torch.float32)


def gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """A paged cache [pages, page_size, D] as [B, N * page_size, D]; a page number outside it means the nearest page."""
    pages = block_table.clamp(0, cache.shape[0] - 1)
    return cache[pages].flatten(1, 2)


def dequantize_cache(
    c_kv: Tensor, k_pe: Tensor | None, descale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The values of an FP8 cache; shapes as in :func:`mla_decode`."""
    rank = c_kv.shape[-1]
    groups = latent_scales(k_pe, descale)
    values = fp8_dequantize_reference(c_kv, descale[..., :groups], rank if groups == 1 else SCALE_GROUP, dtype)
    if k_pe is None or k_pe.dtype not in FP8_DTYPES:
        return values, None if k_pe is None else k_pe.to(dtype)
    return values, fp8_dequantize_reference(k_pe, descale[..., groups:], k_pe.shape[-1], dtype)


def latent_scales(k_pe: Tensor | None, descale: Tensor) -> int:
    """How many of a token's scales are its latent's: all, but for one where the rotary key is FP8 too."""
    return descale.shape[-1] - (k_pe is not None and k_pe.dtype in FP8_DTYPES)


@torch.library.custom_op("mlacompile::mla_decode", mutates_args=())
def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    block_table: Tensor | None = None,
    descale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax((q_latent @ c_kv^T + q_pe @ k_pe^T) * scale) @ c_kv, and the logarithm of the softmax's denominator.

    Args:
        q_latent: [B, H, S, R] absorbed queries, any strides.
        q_pe: [B, H, S, P] rotary queries, or None together with ``k_pe``.
        c_kv: [B, T, R] latent cache; the last dimension contiguous, else it is copied. With a ``block_table``
            [pages, page_size, R], shared by all rows.
        k_pe: [B, T, P] or [pages, page_size, P] rotary keys, likewise. Both may be slices of one buffer.
        mask: [B, S, T], any of the three may be 1. Bool (True: attend) or additive (-inf: not visible).
        start, length: int32 [B]: the row sees tokens start <= t < length. Default 0 and T; what lies beyond is cut off.
        block_table: int32 [B, N]: token t of row b lies in page block_table[b, t // page_size]; T = N * page_size.
            page_size is a power of two from 16. Entries of tokens that nobody sees may be anything; an entry
            outside the cache means its nearest page, so that no table makes a kernel read foreign memory.
        descale: float32, with a ``c_kv`` in FP8 (e4m3 or e5m2): [B, T, G] or [pages, page_size, G] factors of the
            latent, G = 1 for one a token, or one for every 128 values. ``k_pe`` then is in the dtype of the queries, or
            in FP8 too, with its factor in one more column. Views of one run of bytes will do.
        scale: multiplies the scores, before an additive mask is added.
        causal: query s also sees only t <= length - S + s.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.

    Returns:
        out [B, H, S, R] in the dtype of ``q_latent`` and lse [B, H, S] in float32 (natural logarithm). A query that
        sees nothing gets 0 and -inf. A cache row that no query of its batch row sees never reaches a result, NaN or
        not; a NaN in a row that some query sees reaches that query and may reach others of its batch row.
    """
    _check(q_latent, q_pe, c_kv, k_pe, mask, start, length, block_table, descale, impl)
    c_kv = last_dim_contiguous(c_kv)
    k_pe = None if k_pe is None else last_dim_contiguous(k_pe)
    start, length = (None if x is None else x.contiguous() for x in (start, length))
    block_table = None if block_table is None else last_dim_contiguous(block_table)
    descale = None if descale is None else last_dim_contiguous(descale)
    tensors = (q_latent, q_pe, c_kv, k_pe, mask, start, length, block_table, descale)
    run = _implementation(impl, tensors, scale, causal)
    out, lse = run(*tensors, scale=scale, causal=causal)
    return out.contiguous(), lse.contiguous()  # the strides that graphs are compiled for


def _implementation(impl: str, tensors: tuple[Tensor | None, ...], scale: float, causal: bool) -> Callable[..., Any]:
    """What computes a call: the named kernel, the best that supports it, or the reference."""
    kernel = registry.chosen("mla_decode", impl, *tensors, scale=scale, causal=causal)
    return mla_decode_reference if kernel is None else kernel.run


@mla_decode.register_fake
def _mla_decode_fake(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    block_table: Tensor | None = None,
    descale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check(q_latent, q_pe, c_kv, k_pe, mask, start, length, block_table, descale, impl)
    b, h, s, r = q_latent.shape
    return q_latent.new_empty(b, h, s, r), q_latent.new_empty(b, h, s, dtype=torch.float32)


def _check(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    block_table: Tensor | None,
    descale: Tensor | None,
    impl: str,
) -> None:
    """Raise UnsupportedInputError naming the argument, what it was, what it should be and what to do."""
    if q_latent.dim() != 4 or c_kv.dim() != 3:
        raise UnsupportedInputError(
            f"mla_decode: got q_latent {_shape(q_latent)} and c_kv {_shape(c_kv)}; expected [B, H, S, R] and "
            "[B, T, R]. Give queries a head and a query dimension, and view a [B, 1, T, R] cache as [B, T, R]."
        )
    b, h, s, r = q_latent.shape
    units, per_unit, t = (
        b,
        c_kv.shape[1],
        c_kv.shape[1],
    )  # a contiguous cache has one unit a batch row, a paged one pages
    if block_table is None:
        _check_shape("c_kv", c_kv, (b, t, r), "batch and rank must be those of q_latent")
    else:
        _check_block_table(block_table, c_kv, b)
        units, t = c_kv.shape[0], block_table.shape[1] * per_unit
        _check_shape("c_kv", c_kv, (units, per_unit, r), "the rank must be that of q_latent")
    if (q_pe is None) != (k_pe is None):
        raise UnsupportedInputError(
            f"mla_decode: got q_pe {_shape(q_pe)} with k_pe {_shape(k_pe)}; expected both or neither. "
            "Pass None for both to go without rope."
        )
    if q_pe is not None and k_pe is not None:
        width = q_pe.shape[-1]
        _check_shape("q_pe", q_pe, (b, h, s, width), "batch, heads and queries must be those of q_latent")
        _check_shape(
            "k_pe", k_pe, (units, per_unit, width), "rows and tokens must be those of c_kv, the width that of q_pe"
        )
    for name, bound in (("start", start), ("length", length)):
        if bound is not None:
            _check_shape(name, bound, (b,), "one value a batch row")
            if bound.dtype != torch.int32:
                raise UnsupportedInputError(
                    f"mla_decode: got {name} of {bound.dtype}; expected torch.int32. "
                    f"Convert with {name}.to(torch.int32)."
                )
    _check_dtypes(q_latent, q_pe, c_kv, k_pe, descale)
    if descale is not None:
        _check_descale(descale, c_kv, k_pe)
    if mask is not None:
        _check_mask(mask, (b, s, t))
    others = {"q_pe": q_pe, "c_kv": c_kv, "k_pe": k_pe, "mask": mask, "start": start, "length": length}
    others |= {"block_table": block_table, "descale": descale}
    for name, other in others.items():
        if other is not None and other.device != q_latent.device:
            raise UnsupportedInputError(
                f"mla_decode: got {name} on {other.device} and q_latent on {q_latent.device}; expected one device. "
                f"Move {name} with .to(q_latent.device)."
            )
    names = ("auto", "reference", *registry.names("mla_decode"))
    if impl not in names:
        raise UnsupportedInputError(
            f"mla_decode: got impl={impl!r}; expected one of {', '.join(names)}. 'auto' picks the best."
        )


def _check_block_table(block_table: Tensor, c_kv: Tensor, batch: int) -> None:
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise UnsupportedInputError(
            f"mla_decode: got block_table {_shape(block_table)}; expected [B, N] with B = {batch}: the page numbers of "
            "each batch row, in order. Pad rows to one length with any number."
        )
    if block_table.dtype != torch.int32:
        raise UnsupportedInputError(
            f"mla_decode: got block_table of {block_table.dtype}; expected torch.int32. "
            "Convert with block_table.to(torch.int32)."
        )
    size = c_kv.shape[1]
    if size < 16 or size & (size - 1):
        raise UnsupportedInputError(
            f"mla_decode: got c_kv {_shape(c_kv)} with a block_table, so pages of {size} tokens; expected a power of "
            "two from 16. Make pages of 64 tokens, say."
        )


def _check_dtypes(
    q_latent: Tensor, q_pe: Tensor | None, c_kv: Tensor, k_pe: Tensor | None, descale: Tensor | None
) -> None:
    if q_latent.dtype not in _FLOATS:
        raise UnsupportedInputError(
            f"mla_decode: got q_latent of {q_latent.dtype}; expected float32, bfloat16 or float16. Dequantize it first."
        )
    for name, x in (("q_pe", q_pe), ("c_kv", c_kv), ("k_pe", k_pe)):
        if x is None or x.dtype == q_latent.dtype:
            continue
        if x is not q_pe and x.dtype in FP8_DTYPES:
            if descale is None:
                raise UnsupportedInputError(
                    f"mla_decode: got {name} of {x.dtype} without descale; expected float32 factors that multiply it "
                    "on read. Pass those that fp8_quantize returned."
                )
            continue
        raise UnsupportedInputError(
            f"mla_decode: got {name} of {x.dtype} with q_latent of {q_latent.dtype}; expected one dtype for "
            "all four. Convert the queries to the dtype of the cache."
        )


def _check_descale(descale: Tensor, c_kv: Tensor, k_pe: Tensor | None) -> None:
    if c_kv.dtype not in FP8_DTYPES:
        raise UnsupportedInputError(
            f"mla_decode: got descale with c_kv of {c_kv.dtype}; expected an FP8 cache. Leave descale out."
        )
    rank = c_kv.shape[-1]
    want = f"float32 [{c_kv.shape[0]}, {c_kv.shape[1]}, G] with G = 1 or {scale_groups(rank)}"
    if k_pe is not None and k_pe.dtype in FP8_DTYPES:
        want += ", and one column more for k_pe"
    fits = descale.dim() == 3 and descale.shape[:2] == c_kv.shape[:2] and descale.dtype == torch.float32
    if not fits or latent_scales(k_pe, descale) not in (1, scale_groups(rank)):
        raise UnsupportedInputError(
            f"mla_decode: got descale of {descale.dtype} {list(descale.shape)}; expected {want}. "
            "It multiplies on read: pass 1 / scale if yours divides."
        )


def _check_mask(mask: Tensor, full: tuple[int, int, int]) -> None:
    fits = mask.dim() == 3 and all(m == 1 or m == f for m, f in zip(mask.shape, full, strict=True))
    if not fits:
        raise UnsupportedInputError(
            f"mla_decode: got a mask {_shape(mask)}; expected [B, S, T] = {list(full)} where any size may "
            "be 1. Drop the head dimension of a [B, 1, S, T] mask with mask[:, 0]."
        )
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise UnsupportedInputError(
            f"mla_decode: got a mask of {mask.dtype}; expected bool (True: attend) or a floating point mask to "
            "add. Convert an integer mask with mask != 0."
        )


def _check_shape(name: str, x: Tensor, want: tuple[int, ...], why: str) -> None:
    if x.dim() != len(want) or any(have != size for have, size in zip(x.shape, want, strict=True)):
        raise UnsupportedInputError(
            f"mla_decode: got {name} {_shape(x)}; expected {list(want)}: {why}. Check how it was reshaped."
        )


def _shape(x: Tensor | None) -> str:
    return "None" if x is None else f"of shape {list(x.shape)}"
