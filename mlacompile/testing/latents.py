"""Inputs for ``mla_decode`` that try to break it, its value in float64 by brute force, and the error a kernel may make.

Every tolerance here follows from the arithmetic: unit roundoffs, lengths of sums and the sizes of the very inputs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.ops.fp8_quantize import fp8_dequantize_reference, fp8_quantize_reference


@dataclass(frozen=True)
class LatentCase:
    """One shape of ``mla_decode``, with everything optional about it.

    fused: ``c_kv`` and ``k_pe`` are slices of one [B, T, R+P] buffer. mask: None, "bool", "additive" or "shared" (bool,
    size 1 in batch and queries). poison: rows that no query sees hold NaN and infinities.
    """

    batch: int = 2
    heads: int = 3
    queries: int = 1
    tokens: int = 70
    rank: int = 40
    rope: int = 8
    dtype: torch.dtype = torch.float32
    fused: bool = False
    mask: str | None = None
    start: bool = False
    length: bool = False
    causal: bool = False
    poison: bool = False

    def __str__(self) -> str:
        size = f"b{self.batch}h{self.heads}s{self.queries}t{self.tokens}r{self.rank}p{self.rope}"
        flags = [name for name, value in asdict(self).items() if value is True]
        return "-".join([size, str(self.dtype).removeprefix("torch."), *([self.mask] if self.mask else []), *flags])


@dataclass
class LatentInputs:
    """Arguments of ``mla_decode``: ``op(*inputs.tensors, **inputs.keywords)``."""

    tensors: tuple[Tensor | None, ...]
    keywords: dict[str, Any]


def make_inputs(case: LatentCase, *, device: str | torch.device = "cpu", seed: int = 0) -> LatentInputs:
    """Random inputs of that shape. The same seed gives the same inputs on every device."""
    gen = torch.Generator().manual_seed(seed)
    b, h, s, t, r, p = case.batch, case.heads, case.queries, case.tokens, case.rank, case.rope

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen).to(case.dtype)

    # Queries come out of a projection as [B, S, H, ...]: their strides are not those of a contiguous [B, H, S, ...].
    q_latent, q_pe = randn(b, s, h, r).transpose(1, 2), randn(b, s, h, p).transpose(1, 2) if p else None
    cache = randn(b, t, r + p)
    c_kv, k_pe = cache[..., :r], cache[..., r:] if p else None
    if not case.fused:
        c_kv, k_pe = c_kv.contiguous(), None if k_pe is None else k_pe.contiguous()
    start = torch.randint(0, t // 2 + 1, (b,), generator=gen, dtype=torch.int32) if case.start else None
    length = torch.randint(0, t + 1, (b,), generator=gen, dtype=torch.int32) if case.length else None
    if length is not None:
        length[-1] = t
    tensors = (q_latent, q_pe, c_kv, k_pe, _mask(case, gen), start, length)
    inputs = LatentInputs(tensors, {"scale": (r + p) ** -0.5, "causal": case.causal})
    if case.poison:
        poison_unseen(inputs)
    if case.fused:  # a plain .to() would give each slice storage of its own
        moved = cache.to(device)
        c_kv, k_pe = moved[..., :r], moved[..., r:] if p else None
    else:
        c_kv, k_pe = c_kv.to(device), None if k_pe is None else k_pe.to(device)
    move = [None if x is None else x.to(device) for x in inputs.tensors]
    inputs.tensors = (move[0], move[1], c_kv, k_pe, *move[4:])
    return inputs


def sloped(inputs: LatentInputs, slope: float) -> LatentInputs:
    """The same call with scores that rise by ``slope`` or a half or a quarter of it from token to token, by heads, and
    latents that differ by 2^20 in size.

    For a call without rotary keys. What a softmax counts from has to follow them, up or down. Each score is one product
    of a power of two, so that a kernel's sum of them is exact however few bits of a sum it keeps.
    """
    q_latent, _, c_kv, *rest = inputs.tensors
    assert q_latent is not None
    assert c_kv is not None
    tokens = torch.arange(c_kv.shape[1], device=c_kv.device)
    q, keys = torch.zeros_like(q_latent), c_kv * 2.0 ** (-4 * (tokens % 6))[:, None]
    q[..., 0] = 2.0 ** (3 - torch.arange(q.shape[1], device=q.device) % 3)[:, None]
    keys[..., 0] = (tokens - c_kv.shape[1] // 2) * slope / (8 * inputs.keywords["scale"])
    return LatentInputs((q, None, keys.to(c_kv.dtype), *rest), inputs.keywords)


WILD = (2**31 - 1, -1, -(2**31), 1 << 20)  # page numbers that lie in no cache


def paged(inputs: LatentInputs, page: int, *, seed: int = 0, shuffled: bool = True) -> LatentInputs:
    """The same call on a cache of pages: in random order, among pages of NaN, with wild numbers where nobody looks.

    ``length`` becomes explicit, as a row's last page reaches beyond its tokens. Fused caches stay fused.
    """
    q_latent, q_pe, c_kv, k_pe, mask, start, length, *_ = inputs.tensors
    descale = inputs.tensors[8] if len(inputs.tensors) > 8 else None
    assert c_kv is not None
    assert mask is None
    b, t, r = c_kv.shape
    n = -(-t // page)
    gen = torch.Generator().manual_seed(seed)
    pages = torch.randperm(2 * b * n, generator=gen)[: b * n] if shuffled else torch.arange(b * n)

    def to_pages(x: Tensor) -> Tensor:
        """[B, T, D] as pages; every byte of the others is 255, which is NaN in all dtypes."""
        raw = x.cpu().contiguous().view(torch.uint8)
        rows = torch.full((2 * b * n, page, raw.shape[2]), 255, dtype=torch.uint8)
        rows[pages] = torch.nn.functional.pad(raw, (0, 0, 0, n * page - t), value=255).view(b * n, page, -1)
        return rows.to(x.device).view(x.dtype)

    if descale is None and k_pe is not None and k_pe.stride(1) == r + k_pe.shape[2]:
        both = to_pages(torch.cat((c_kv, k_pe), -1))
        c_kv, k_pe = both[..., :r], both[..., r:]
    else:
        c_kv, k_pe = to_pages(c_kv), None if k_pe is None else to_pages(k_pe)
    descale = None if descale is None else to_pages(descale)
    if length is None:
        length = torch.full((b,), t, dtype=torch.int32, device=c_kv.device)
    table = pages.to(torch.int32).view(b, n)
    for row in range(b):
        first = 0 if start is None else max(int(start[row]), 0) // page
        end = -(-max(min(int(length[row]), t), 0) // page)
        for column in (*range(min(first, n)), *range(end, n)):
            table[row, column] = WILD[(row + column) % len(WILD)]
    tensors = (q_latent, q_pe, c_kv, k_pe, None, start, length, table.to(c_kv.device), descale)
    return LatentInputs(tensors, dict(inputs.keywords))


def quantized(
    inputs: LatentInputs,
    *,
    per: str = "token",
    dtype: torch.dtype = torch.float8_e4m3fn,
    rope: bool = False,
    rounded: bool = True,
) -> tuple[LatentInputs, LatentInputs]:
    """The same call on an FP8 cache, and the call on what that cache says, which is what a kernel should compute.

    per: "token", or "block": a factor for every 128 values, and then the values are rounded to the dtype of the
    queries if ``rounded``, as a product of them needs. rope: the rotary keys are FP8 as well.
    """
    c_kv, k_pe = inputs.tensors[2], inputs.tensors[3]
    assert c_kv is not None
    rank = c_kv.shape[2]
    group = rank if per == "token" else min(SCALE_GROUP, rank)
    q, descale = fp8_quantize_reference(c_kv, group, dtype)
    rounding = c_kv.dtype if rounded and descale.shape[2] > 1 else torch.float32
    said = fp8_dequantize_reference(q, descale, group, rounding)
    new_pe = said_pe = k_pe
    if rope and k_pe is not None:
        new_pe, pe_descale = fp8_quantize_reference(k_pe, k_pe.shape[2], dtype)
        said_pe = fp8_dequantize_reference(new_pe, pe_descale, k_pe.shape[2], k_pe.dtype)
        descale = torch.cat((descale, pe_descale), -1)
    head, tail = inputs.tensors[:2], inputs.tensors[4:7]
    return (
        LatentInputs((*head, q, new_pe, *tail, None, descale), dict(inputs.keywords)),
        LatentInputs((*head, said, said_pe, *tail), dict(inputs.keywords)),
    )


def in_one_run(inputs: LatentInputs) -> LatentInputs:
    """The same call on an FP8 cache whose tokens lie in one run of bytes each: latent, factors, rotary key."""
    c_kv, k_pe, descale = inputs.tensors[2], inputs.tensors[3], inputs.tensors[8]
    assert c_kv is not None and descale is not None  # noqa: PT018
    arrays = [x for x in (c_kv, descale, k_pe) if x is not None]
    parts = [x.contiguous().view(torch.uint8) for x in arrays]
    padded = [torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)) for x in parts]
    run, at, views = torch.cat(padded, -1), 0, []
    for array, part, whole in zip(arrays, parts, padded, strict=True):
        views.append(run[..., at : at + part.shape[-1]].view(array.dtype))
        at += whole.shape[-1]
    tensors = list(inputs.tensors)
    tensors[2], tensors[8], tensors[3] = views[0], views[1], None if k_pe is None else views[2]
    return LatentInputs(tuple(tensors), dict(inputs.keywords))


def _mask(case: LatentCase, gen: torch.Generator) -> Tensor | None:
    if case.mask is None:
        return None
    shape = (1, 1, case.tokens) if case.mask == "shared" else (case.batch, case.queries, case.tokens)
    attend = torch.rand(shape, generator=gen) < 0.7
    if case.mask != "additive":
        return attend
    return torch.where(attend, torch.randn(shape, generator=gen), -math.inf)


def seen_tokens(inputs: LatentInputs, row: int, query: int) -> Tensor:
    """Indices of the tokens that one query sees, straight from the contract's wording."""
    q_latent, _, c_kv, _, mask, start, length, *_ = inputs.tensors
    assert q_latent is not None
    assert c_kv is not None
    queries, tokens = q_latent.shape[2], c_kv.shape[1]
    first = 0 if start is None else int(start[row])
    end = tokens if length is None else int(length[row])
    if inputs.keywords.get("causal", False):
        end = min(end, end - queries + query + 1)
    seen = torch.arange(max(first, 0), max(first, 0, min(end, tokens)), device=c_kv.device)
    if mask is not None:
        attend = mask.expand(q_latent.shape[0], queries, tokens)[row, query, seen]
        seen = seen[attend if attend.dtype == torch.bool else attend != -math.inf]
    return seen


def poison_unseen(inputs: LatentInputs) -> None:
    """Fill, in place, every cache row that no query of its batch row sees with NaN, +inf and -inf in turn."""
    q_latent, _, c_kv, k_pe, *_ = inputs.tensors
    assert q_latent is not None
    assert c_kv is not None
    poison = (math.nan, math.inf, -math.inf)
    for row in range(c_kv.shape[0]):
        seen: set[int] = set()
        for query in range(q_latent.shape[2]):
            seen.update(seen_tokens(inputs, row, query).tolist())
        for token in sorted(set(range(c_kv.shape[1])) - seen):
            for cache in (c_kv, k_pe):
                if cache is not None:
                    cache[row, token] = poison[token % 3]


@dataclass
class Exact:
    """float64 results [B, H, S, R] and [B, H, S], and the largest error that arithmetic of given roundoffs may make."""

    out: Tensor
    lse: Tensor
    out_bound: Tensor
    lse_bound: Tensor


def exact(
    inputs: LatentInputs,
    *,
    unit: float = 2**-23,
    operand_unit: float = 0.0,
    key_unit: float = 0.0,
    rows: int | None = None,
) -> Exact:
    """Brute force in float64, one query at a time over the tokens it sees; nothing shared with the op's code.

    unit: relative error of one accumulation step. operand_unit: unit roundoff of the dtype in which P enters the second
    product and in which ``out`` is stored (0: only ``unit``). key_unit: relative error of every cached value that the
    kernel works with, as key and as value. rows: only the first batch rows, for large inputs.

    The bounds are first-order forward errors: a score of n products is off by at most (n + 3) * unit *
    sum|q||k|, which a softmax at most doubles into a relative error of each weight; sums over m tokens add m * unit.
    Tensor cores truncate where they align addends, so 2^-22 describes them; 2^-23 describes float32 on a CPU.
    """
    q_latent, q_pe, c_kv, k_pe, mask, *_ = inputs.tensors
    assert q_latent is not None
    assert c_kv is not None
    scale = inputs.keywords["scale"]
    b, h, s, r = q_latent.shape
    b = b if rows is None else min(b, rows)
    rows_of = c_kv.new_zeros(b, h, s, r, dtype=torch.float64)
    result = Exact(rows_of, torch.full_like(rows_of[..., 0], -math.inf), rows_of.clone(), rows_of[..., 0].clone())
    for row in range(b):
        for query in range(s):
            seen = seen_tokens(inputs, row, query)
            if seen.numel() == 0:
                continue
            q, v = q_latent[row, :, query].double(), c_kv[row, seen].double()
            k = v
            if q_pe is not None and k_pe is not None:
                q = torch.cat([q, q_pe[row, :, query].double()], -1)
                k = torch.cat([v, k_pe[row, seen].double()], -1)
            scores, sizes = q @ k.T * scale, q.abs() @ k.abs().T * abs(scale)
            if mask is not None and mask.dtype != torch.bool:
                bias = mask.expand(q_latent.shape[0], s, c_kv.shape[1])[row, query, seen].double()
                scores, sizes = scores + bias, sizes + bias.abs()
            lse = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - lse[:, None])
            result.out[row, :, query], result.lse[row, :, query] = weights @ v, lse
            # exp2(x) carries the rounding of x itself, hence + |score - lse|
            score_error = (((q.shape[1] + 3) * unit + key_unit) * sizes + unit * (scores - lse[:, None]).abs()).amax(-1)
            sum_error = (seen.numel() + 8) * unit
            spread = weights @ v.abs()
            stored = max(operand_unit, unit)
            result.lse_bound[row, :, query] = score_error + sum_error + 4 * unit * lse.abs()
            result.out_bound[row, :, query] = (
                2 * score_error[:, None] + 2 * sum_error + operand_unit + key_unit
            ) * spread + stored * result.out[row, :, query].abs()
    return result


def least_of(dtype: torch.dtype) -> float:
    """Half of a dtype's smallest number: what it may be off by where there is hardly anything to hold."""
    kept = torch.finfo(dtype)
    return kept.smallest_normal * kept.eps / 2


def least_of_e4m3(stored: LatentInputs, said: LatentInputs) -> Tensor:
    """What the output may be off by because e4m3 has no number between 0 and 2^-9: ``[B, H, 1, R]`` in float64.

    stored, said: as ``quantized`` has them, of one query, one factor a token and no rotary keys. P of a token is
    its weight times its factor, in a unit in which the largest number it may be is ``top`` at most.
    """
    from mlacompile.kernels.mla_decode import hopper_turned_by_turns as kernel

    numbers = (getattr(kernel, name) for name in ("SLACK", "SPARE", "FP8_ROOM"))
    slack, spare, room = (getattr(x, "value", x) for x in numbers)  # the kernel may run as Python
    q_latent, _, c_kv, *_ = said.tensors
    descale = stored.tensors[8]
    assert q_latent is not None
    assert c_kv is not None
    assert descale is not None
    scores = q_latent[:, :, 0].double() @ c_kv.double().transpose(1, 2) * said.keywords["scale"]
    weights, factor = torch.softmax(scores, -1), descale[:, :, 0].double()
    result = q_latent.new_zeros(q_latent.shape, dtype=torch.float64)
    top = torch.zeros_like(weights[..., 0])
    blocks = list(zip(weights.split(64, -1), factor.split(64, 1), c_kv.double().split(64, 1), strict=True))
    for w, f, v in reversed(blocks):  # the last block of an item is taken first
        top = torch.maximum(w.amax(-1) * f.amax(-1)[:, None] * 2.0 ** (slack + spare), top)
        step = 2.0**-10 * 2.0 ** (1 - room - slack) * top
        result[:, :, 0] += step[..., None] * (v / f[..., None]).abs().sum(1)[:, None]
    return result


def worst(got: Tensor, want: Tensor, bound: Tensor) -> str:
    """'' when |got - want| <= bound everywhere (equal infinities agree), else a sentence with the worst element."""
    got = got.double()
    error = torch.where(got == want, 0.0, (got - want).abs())
    excess = torch.where(error.isnan(), math.inf, error - bound)
    if excess.numel() == 0 or float(excess.max()) <= 0:
        return ""
    flat = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
    return (
        f"worst at {index}: got {float(got[index]):.6g}, want {float(want[index]):.6g}, "
        f"error {float(error[index]):.3g} > bound {float(bound[index]):.3g}; "
        f"{int((excess > 0).sum())} of {got.numel()} exceed"
    )
