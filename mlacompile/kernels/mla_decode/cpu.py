"""``mla_decode`` on a CPU: a loop of our own in float32 (``cpu_loop.py``), and where that cannot be, as with masks and
in 16 bits, one flash attention in which stretches of the context stand where heads usually do.

PyTorch's flash attention for CPUs uses a block of keys for both products while the processor's cache holds it, but
hands threads whole heads, and a latent cache has one. So the H*S rows become the queries of a single head, each "head"
gets another stretch of the same cache (a strided view, no copy), and log-sum-exps merge the stretches. Rotary scores
and masks enter as a bias. All of it runs eagerly inside the op and may look at data: tokens outside the window that
somebody sees are never touched.

Of an FP8 cache only the window is widened, a chunk of tokens at a time, into memory that the processor's cache holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels.device import interpreted
from mlacompile.kernels.mla_decode.cpu_loop import loop_reasons, mla_decode_loop
from mlacompile.kernels.mla_decode.supports import last_dim_contiguous

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_STRETCH = 512  # tokens; a shorter stretch costs more than the thread it occupies brings
_CHUNK = 1 << 18  # values of an FP8 cache that are widened at a time, unless threads ask for more tokens
_ROWS = 32  # rows that flash attention gives a thread at least
_FAR_FROM_OVERFLOW = 2.0**100  # a sum of products this large stays finite in float32 at any rank

Window = tuple[int, int]


def cpu_reasons(
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
) -> list[str]:
    """Why the CPU kernel cannot run on these inputs; empty when it can. Called like ``mla_decode``."""
    reasons = []
    if q_latent.device.type != "cpu":
        reasons.append(f"inputs are on {q_latent.device}, the kernel needs a CPU")
    if block_table is not None:
        reasons.append("the cache is paged")
    if interpreted():
        reasons.append("TRITON_INTERPRET=1 asks for Triton's interpreter")
    if not hasattr(torch.ops.aten, _FLASH):
        reasons.append(f"torch {torch.__version__} has no flash attention for CPUs")
    return reasons


@dataclass(frozen=True)
class _Call:
    """One call, its cache cut to a window.

    additive: [B, S, T] or broadcastable. visible: bool, broadcastable to [B, S, T]; None when everything is seen.
    """

    q_latent: Tensor
    q_pe: Tensor | None
    c_kv: Tensor
    k_pe: Tensor | None
    additive: Tensor | None
    visible: Tensor | None
    scale: float
    descale: Tensor | None = None

    def part(self, first: int, end: int, room: _Room) -> _Call:
        """An FP8 call on some of its tokens, in the dtype of the queries; their latents lie in ``room``."""
        assert self.descale is not None
        tokens = slice(first, end)
        additive, visible = (
            x if x is None or x.shape[2] == 1 else x[..., tokens] for x in (self.additive, self.visible)
        )
        k_pe = None if self.k_pe is None else self.k_pe[:, tokens]
        c_kv, k_pe = _widened(self.c_kv[:, tokens], k_pe, self.descale[:, tokens], room)
        return replace(self, c_kv=c_kv, k_pe=k_pe, additive=additive, visible=visible, descale=None)


@dataclass(frozen=True)
class _Room:
    """Memory for the latents of a chunk, used by one chunk after the other: fresh memory costs more than what is done
    in it. bits: int32 [B, tokens, R]. values: the same in the dtype of the queries, None where that is float32."""

    bits: Tensor
    values: Tensor | None

    @classmethod
    def of(cls, batch: int, tokens: int, rank: int, dtype: torch.dtype) -> _Room:
        bits = torch.empty(batch, tokens, rank, dtype=torch.int32)
        return cls(bits, None if dtype == torch.float32 else torch.empty(batch, tokens, rank, dtype=dtype))


def mla_decode_cpu(
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
    stretches: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``mla_decode`` for inputs that ``cpu_reasons`` has nothing against. stretches: None lets the shape decide."""
    c_kv, k_pe = last_dim_contiguous(c_kv), None if k_pe is None else last_dim_contiguous(k_pe)
    tensors = (q_latent, q_pe, c_kv, k_pe, mask, start, length, None, descale)
    b, h, s, r = q_latent.shape
    windows = _windows(mask, start, length, b, c_kv.shape[1])
    occupied = [w for w in windows if w[0] < w[1]]
    if not occupied or q_latent.numel() == 0:
        return q_latent.new_zeros(b, h, s, r), q_latent.new_full((b, h, s), -math.inf, dtype=torch.float32)
    if not loop_reasons(q_latent, mask, descale):
        ends = ([c_kv.shape[1]] * b if length is None else length.tolist()) if causal and s > 1 else None
        return mla_decode_loop(q_latent, q_pe, c_kv, k_pe, windows, ends, scale=scale, splits=stretches)
    first, end = min(w[0] for w in occupied), max(w[1] for w in occupied)
    if 2 * sum(w[1] - w[0] for w in occupied) < b * (end - first):  # most of the common window is dead
        rows = ([x if x is None or x.shape[0] == 1 else x[i : i + 1] for x in tensors] for i in range(b))
        parts = [mla_decode_cpu(*row, scale=scale, causal=causal, stretches=stretches) for row in rows]  # type: ignore[arg-type]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    mask = mask if mask is None or mask.shape[2] == 1 else mask[..., first:end]
    last = (c_kv.shape[1] if length is None else length[:, None, None]) if causal and s > 1 else None
    visible = _visible(mask, windows, last, s, first, end)
    additive = None if mask is None or mask.dtype == torch.bool else mask
    k_pe = None if k_pe is None else k_pe[:, first:end]
    descale = None if descale is None else descale[:, first:end]
    call = _Call(q_latent, q_pe, c_kv[:, first:end], k_pe, additive, visible, scale, descale)
    out, lse = _attend_widened(call, stretches)
    return out.view(b, h, s, r), lse.view(b, h, s).to(torch.float32)


def _windows(mask: Tensor | None, start: Tensor | None, length: Tensor | None, batch: int, tokens: int) -> list[Window]:
    """For each batch row the first token that some query may see and one past the last; (0, 0) when there is none."""
    firsts = [0] * batch if start is None else [max(n, 0) for n in start.tolist()]
    ends = [tokens] * batch if length is None else [min(n, tokens) for n in length.tolist()]
    if mask is not None:
        seen = _attends(mask).any(dim=1).expand(batch, tokens)
        token = torch.arange(tokens)
        lowest = torch.where(seen, token, tokens).amin(1).tolist() if tokens else firsts
        highest = torch.where(seen, token, -1).amax(1).tolist() if tokens else firsts
        firsts = [max(pair) for pair in zip(firsts, lowest, strict=True)]
        ends = [min(n, t + 1) for n, t in zip(ends, highest, strict=True)]
    return [(first, end) if first < end else (0, 0) for first, end in zip(firsts, ends, strict=True)]


def _attends(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != -math.inf


def _visible(
    mask: Tensor | None, windows: list[Window], last: Tensor | int | None, queries: int, first: int, end: int
) -> Tensor | None:
    """What each query sees of the tokens first..end, or None when every query sees all of them.

    mask: already cut to these tokens. last: where causal rows end, None when not causal.
    """
    uneven = any(w != (first, end) for w in windows)
    if mask is None and last is None and not uneven:
        return None
    token = torch.arange(first, end)
    conditions = [] if mask is None else [_attends(mask)]
    if uneven:
        bounds = torch.tensor(windows)[:, :, None, None]
        conditions.append((token >= bounds[:, 0]) & (token < bounds[:, 1]))
    if last is not None:
        conditions.append(token <= last - queries + torch.arange(queries).view(1, -1, 1))
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return None if visible.all() else visible


def _without_dead_rows(call: _Call) -> _Call:
    """Zero the latents that no query of their batch row sees, unless they are harmless: 0 * finite is 0.

    Only a hole in the window needs it, and a copy only a hole that holds something odd. Rotary keys never do: the bias
    that they give is overwritten.
    """
    if call.visible is None:
        return call
    dead = ~call.visible.any(dim=1).expand(call.c_kv.shape[:2])
    if not dead.any():
        return call
    reach = float(call.c_kv[dead].abs().amax()) * max(float(call.q_latent.abs().amax() * call.scale), 1.0)
    if reach < _FAR_FROM_OVERFLOW:  # not so for NaN
        return call
    return replace(call, c_kv=call.c_kv.masked_fill(dead.unsqueeze(-1), 0.0))


def _attend_widened(call: _Call, stretches: int | None) -> tuple[Tensor, Tensor]:
    """out [B, H*S, R] and lse [B, H*S]; an FP8 cache a chunk at a time."""
    if call.descale is None:
        return _attend(_without_dead_rows(call), stretches)
    b, h, s, r = call.q_latent.shape
    tokens = call.c_kv.shape[1]
    step = min(max(_CHUNK // (b * r), _STRETCH * _stretches(b, h * s, tokens)), tokens)
    room = _Room.of(b, step, r, call.q_latent.dtype)
    out, lse = _attend(_without_dead_rows(call.part(0, step, room)), stretches)
    for first in range(step, tokens, step):
        more, lse_more = _attend(_without_dead_rows(call.part(first, first + step, room)), stretches)
        both = torch.stack((lse, lse_more), 1)
        out, lse = _merge(torch.stack((out, more), 1), both, both == -math.inf)
    return out, lse


def _widened(c_kv: Tensor, k_pe: Tensor | None, descale: Tensor, room: _Room) -> tuple[Tensor, Tensor | None]:
    """An FP8 cache times its factors: a product in float32, rounded to the dtype of the queries."""
    scaled_rope = k_pe is not None and k_pe.dtype in _SHIFTED
    groups, tokens = descale.shape[2] - scaled_rope, slice(c_kv.shape[1])
    values = _in_float32(c_kv, room.bits[:, tokens])
    for i in range(groups):
        columns = slice(i * SCALE_GROUP, (i + 1) * SCALE_GROUP) if groups > 1 else slice(None)
        values[..., columns] *= descale[..., i : i + 1]
    dtype = torch.float32 if room.values is None else room.values.dtype
    if k_pe is not None and scaled_rope:
        rope = _in_float32(k_pe, torch.empty(k_pe.shape, dtype=torch.int32))
        k_pe = (rope * descale[..., groups:]).to(dtype)
    return values if room.values is None else room.values[:, tokens].copy_(values), k_pe


#: FP8 type -> by how much its bits are shifted to become those of a float32 that lacks a power of two; sign, exponent
#: and mantissa where they then are; and that power.
_SHIFTED = {
    torch.float8_e4m3fn: (20, 0x87F00000 - 2**32, 2.0**120),
    torch.float8_e5m2: (21, 0x8FE00000 - 2**32, 2.0**112),
}


def _in_float32(x: Tensor, bits: Tensor) -> Tensor:
    """FP8 values, exactly, in the memory of ``bits``. PyTorch's own cast takes ten times as long."""
    shift, mask, power = _SHIFTED[x.dtype]
    values = bits.copy_(x.view(torch.int8)).bitwise_left_shift_(shift).bitwise_and_(mask).view(torch.float32)
    low, high = values.mul_(power).aminmax()
    odd = max(-float(low), float(high)) > torch.finfo(x.dtype).max  # NaN and infinity have become numbers beyond it
    flushed = float(torch.tensor(1, dtype=torch.int32).view(torch.float32) * power) == 0.0  # small ones are subnormal
    return values.copy_(x) if odd or flushed else values


def _attend(call: _Call, stretches: int | None) -> tuple[Tensor, Tensor]:
    """out [B, H*S, R] and lse [B, H*S] of a call whose dead rows are harmless.

    Stretches are equally long, as flash attention wants its heads: where their number does not divide the tokens, each
    reaches a little into the next, behind a mask.
    """
    b, h, s, r = call.q_latent.shape
    rows, tokens = h * s, call.c_kv.shape[1]
    n = _stretches(b, rows, tokens) if stretches is None else min(stretches, tokens)
    step = tokens // n
    size = tokens - step * (n - 1)

    latents = call.c_kv.unfold(1, size, step).transpose(2, 3)
    queries = call.q_latent.reshape(b, 1, rows, r).expand(b, n, rows, r)
    bias = _bias(call, n, size, step)
    flash = getattr(torch.ops.aten, _FLASH).default
    out, lse = flash(queries, latents, latents, 0.0, False, attn_mask=bias, scale=call.scale)
    blind = None if bias is None or call.visible is None else (bias == -math.inf).all(dim=3)
    if blind is not None:  # flash attention leaves 0 for these
        lse = lse.masked_fill(blind, -math.inf)
    return _merge(out, lse, blind)


def _stretches(batch: int, rows: int, tokens: int) -> int:
    """As many as there are threads, if rows alone do not occupy them and stretches stay long."""
    busy = batch * -(-rows // _ROWS)
    return max(min(-(-torch.get_num_threads() // busy), tokens // _STRETCH), 1)


def _merge(out: Tensor, lse: Tensor, blind: Tensor | None) -> tuple[Tensor, Tensor]:
    """One result [B, rows, R] of the results [B, stretches, rows, R] of the stretches."""
    if out.shape[1] == 1:
        return out[:, 0], lse[:, 0]
    share = torch.softmax(lse, dim=1)
    largest = share.amax(dim=1)
    if blind is not None:  # a row without any visible token has no shares
        share, largest = share.masked_fill(blind, 0.0), largest.masked_fill(blind.all(dim=1), 1.0)
    # A share is exp(lse - whole): the largest gives the whole without another sum of exponentials.
    return (out * share.unsqueeze(3)).sum(dim=1).to(out.dtype), lse.amax(dim=1) - largest.log()


def _bias(call: _Call, n: int, size: int, step: int) -> Tensor | None:
    """What is added to the latent scores of n stretches of ``size`` tokens, ``step`` apart: rotary scores, the mask,
    -inf where nothing is seen or where a stretch reaches into the next.

    Contiguous [B, n, H*S, size], in at least float32; None when there is nothing to add.
    """
    b, h, s, _ = call.q_latent.shape
    dtype = torch.promote_types(call.q_latent.dtype, torch.float32)
    if call.q_pe is not None and call.k_pe is not None:
        bias = _rotary_scores(call.q_pe.to(dtype), call.k_pe.to(dtype).unfold(1, size, step), call.scale)
    elif size > step or call.additive is not None or call.visible is not None:
        bias = torch.zeros(b, n, h * s, size, dtype=dtype)
    else:
        return None
    by_query = bias.view(b, n, h, s, size)
    if call.additive is not None:
        by_query.add_(_cut(call.additive, size, step))
    if call.visible is not None:
        by_query.masked_fill_(~_cut(call.visible, size, step), -math.inf)
    if size > step:
        bias[:, :-1, :, step:] = -math.inf
    return bias


def _rotary_scores(q_pe: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[B, n, H*S, size] of keys [B, n, P, size]. The library shares the stretches of a product out among threads; there
    is a product a batch row, as stretches of several rows do not lie evenly apart."""
    b, n, p, size = keys.shape
    rows = q_pe.reshape(b, 1, -1, p).expand(b, n, -1, p)
    scores = torch.empty(b, n, rows.shape[2], size, dtype=q_pe.dtype)
    for one, row, key in zip(scores, rows, keys, strict=True):
        torch.baddbmm(one, row, key, beta=0, alpha=scale, out=one)
    return scores


def _cut(x: Tensor, size: int, step: int) -> Tensor:
    """A view [B, n, 1, S, size] of [B, S, T], sizes of 1 as they are."""
    return (x.unsqueeze(1) if x.shape[2] == 1 else x.unfold(2, size, step).transpose(1, 2)).unsqueeze(2)
