"""``mla_prefill`` by PyTorch's own products and attention kernels, on the part of the cache that queries see.

    tokens   start ……………………… length − S │ ……… length          query s is the token length − S + s
             └ chunk ┘└ chunk ┘└ chunk ┘ │ └ square ┘
               every query sees all      │   causal                  merged by log-sum-exp

Where it starts and ends the host has to know: it is told (``bounds``), or reads it, for all rows together. A first
prompt on a cache made for more is then a square of its own length, whatever the cache could hold. While a CUDA graph is
being captured nothing can be read; then every chunk is computed, under a mask made on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from mlacompile.kernels.mla_prefill.attend import attend
from mlacompile.kernels.mla_prefill.windows import Window, read_bounds, windows_of
from mlacompile.visible import visible_tokens

#: out ``[B, H, S, V]`` and lse ``[B, H, S]``
Part: TypeAlias = tuple[Tensor, Tensor]
_EXPANDED_AT_ONCE = 1 << 30  # bytes of keys and values; longer chunks of fewer rows cost less to merge
_WORD = torch.int64
_MERGED_AT_ONCE = 64 << 20  # bytes of float32 copies that merging two results may need


def chunked_reasons(
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
) -> list[str]:
    """Why these inputs go to the reference instead; empty when they need not. Called like ``mla_prefill``."""
    reasons = []
    dtypes = {x.dtype for x in (q, c_kv, k_pe, w_uk, w_uv) if x is not None}
    if len(dtypes) > 1:
        reasons.append(f"inputs mix {', '.join(sorted(map(str, dtypes)))}")
    if q.numel() == 0 or c_kv.numel() == 0:
        reasons.append("an input is empty")
    return reasons


@dataclass(frozen=True)
class _Call:
    """What stays the same over all chunks of some batch rows."""

    q: Tensor
    c_kv: Tensor
    k_pe: Tensor | None
    w_uk: Tensor
    w_uv: Tensor
    scale: float
    nope_at: int
    pe_at: int
    chunk: int

    def rows(self, batch: slice) -> _Call:
        """Some of its batch rows."""
        k_pe = None if self.k_pe is None else self.k_pe[batch]
        return replace(self, q=self.q[batch], c_kv=self.c_kv[batch], k_pe=k_pe)

    def queries(self, some: slice) -> _Call:
        """Some of its queries."""
        return replace(self, q=self.q[:, :, some])


def mla_prefill_chunked(
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
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``mla_prefill`` for inputs that ``chunked_reasons`` has nothing against."""
    call = _Call(q, c_kv, k_pe, w_uk, w_uv, scale, nope_at, pe_at, chunk)
    if q.shape[2] <= absorb_up_to:
        return _absorbed(call, mask, start, length, causal)
    sees = _Sees(mask, start, length, causal)
    windows = _windows(sees, q, c_kv.shape[1], bounds) or [Window(0, c_kv.shape[1], True)]
    groups = list(_alike(windows, q.shape[0], _rows_at_once(call)))
    if len(groups) == 1:
        return _joined(_rows(call, sees, groups[0][1]))
    out = _empty_by_token(call)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for batch, window in groups:
        out[batch], lse[batch] = _joined(_rows(call.rows(batch), sees.rows(batch), window))
    return out, lse


def _rows_at_once(call: _Call) -> int:
    """Batch rows whose chunks, expanded, fit into memory together."""
    tokens, heads = min(call.chunk, call.c_kv.shape[1]), call.q.shape[1]
    row = tokens * heads * (call.q.shape[3] + call.w_uv.shape[1]) * call.q.element_size()
    return max(1, _EXPANDED_AT_ONCE // row)


@dataclass(frozen=True)
class _Sees:
    """What the queries of some batch rows see, as ``mla_decode`` has it."""

    mask: Tensor | None
    start: Tensor | None
    length: Tensor | None
    causal: bool

    def rows(self, batch: slice) -> _Sees:
        """Of some batch rows."""
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[batch]
        start, length = (None if x is None else x[batch] for x in (self.start, self.length))
        return _Sees(mask, start, length, self.causal)

    def of_chunk(
        self, block: slice, queries: int, a: int, b: int, tokens: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """What a block of the queries sees of the tokens a to b, as masks ``[B|1, S|1, C]`` and to add; None:
        everything."""
        mask, length = _cut(self.mask, block, a, b), self.length
        if self.causal:
            length = torch.full((1,), tokens, device=device) if length is None else length
            length = length - (queries - block.stop)
        start, length = (None if x is None else x - a for x in (self.start, length))
        s = block.stop - block.start
        visible = visible_tokens(mask, start, length, self.causal, queries=s, tokens=b - a, device=device)
        added = None if mask is None or mask.dtype == torch.bool else mask
        return None if visible is None else visible.expand(-1, -1, b - a), added


def _windows(sees: _Sees, q: Tensor, tokens: int, bounds: Tensor | None) -> list[Window] | None:
    """What each batch row sees, or None when that cannot be known now. One entry when all rows are alike."""
    batch = q.shape[0]
    if sees.mask is None and sees.start is None and sees.length is None:
        return [Window(0, tokens, False)]
    if bounds is None:
        bounds = read_bounds(sees.mask, sees.start, sees.length, batch=batch, tokens=tokens)
    elif q.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # what was read before may be another when the graph is replayed
    return windows_of(bounds, tokens, causal=sees.causal)


def _alike(windows: list[Window], rows: int, most: int) -> Iterator[tuple[slice, Window]]:
    """Runs of at most so many batch rows that see the same; a single window is that of all rows."""
    windows = windows * rows if len(windows) == 1 else windows
    begin = 0
    for i in range(1, rows + 1):
        if i == rows or windows[i] != windows[begin] or i - begin == most:
            yield slice(begin, i), windows[begin]
            begin = i


def _rows(call: _Call, sees: _Sees, window: Window) -> Iterator[Part]:
    """Batch rows that see the same window, block of queries after block."""
    if window.hidden:
        yield from _masked(call, sees, (window.first, window.end))
        return
    queries = call.q.shape[2]
    past = window.end - queries  # the token that query 0 is
    blind = min(max(window.first - past, 0), queries) if sees.causal else 0
    blind = queries if window.first >= window.end else blind
    if blind:
        yield _nothing(call.queries(slice(0, blind)))
    for block in _blocks(queries - blind, call.chunk):
        begin, end = blind + block.start, blind + block.stop
        seen = _chunks(window.first, past + begin if sees.causal else window.end, call.chunk)
        spans = [_Span(a, b) for a, b in seen]
        if sees.causal:
            spans.append(_Span(past + begin, past + end, square=True))
        yield _merged(call.queries(slice(begin, end)), spans)


def _masked(call: _Call, sees: _Sees, window: tuple[int, int]) -> Iterator[Part]:
    """All chunks of a window, each under the mask that belongs to it, block of queries after block."""
    s, tokens = call.q.shape[2], call.c_kv.shape[1]
    for block in _blocks(s, call.chunk):
        some = call.queries(block)
        spans = [_Span(a, b, partial(sees.of_chunk, block, s, a, b, tokens)) for a, b in _chunks(*window, call.chunk)]
        yield _merged(some, spans) if spans else _nothing(some)


@dataclass(frozen=True)
class _Span:
    """Tokens a to b. under: makes their mask (visible, added) for a device; square: query s is token a + s, and
    causal."""

    a: int
    b: int
    under: Callable[[torch.device], tuple[Tensor | None, Tensor | None]] | None = None
    square: bool = False


def _cut(x: Tensor | None, queries: slice, a: int, b: int) -> Tensor | None:
    if x is None:
        return None
    x = x if x.shape[1] == 1 else x[:, queries]
    return x if x.shape[2] == 1 else x[:, :, a:b]


def _merged(call: _Call, spans: list[_Span]) -> Part:
    """Attention over spans of tokens, one after the other."""
    buffers = _Buffers(call, max(span.b - span.a for span in spans))
    out: Tensor | None = None
    for span in spans:
        visible, added = (None, None) if span.under is None else span.under(call.q.device)
        k, v = buffers.expand(span.a, span.b, visible)
        part, part_lse = attend(call.q, k, v, visible, added, causal=span.square, scale=call.scale)
        if len(spans) == 1:
            return part, part_lse
        if out is None:
            out, lse = part.to(torch.promote_types(part.dtype, torch.float32)), part_lse
        else:
            lse = _merge(out, lse, part, part_lse)
    assert out is not None
    return out.to(call.q.dtype), lse


def _nothing(call: _Call) -> Part:
    """The result of queries that see nothing."""
    b, h, s, _ = call.q.shape
    out = _empty_by_token(call).zero_()
    lse_dtype = torch.promote_types(call.q.dtype, torch.float32)
    return out, call.q.new_full((b, h, s), -math.inf, dtype=lse_dtype)


def _joined(parts: Iterator[Part]) -> Part:
    """Consecutive blocks of queries as one."""
    found = list(parts)
    if len(found) == 1:
        return found[0]
    out, lse = zip(*found, strict=True)
    return torch.cat([x.transpose(1, 2) for x in out], 1).transpose(1, 2), torch.cat(lse, 2)


def _empty_by_token(call: _Call) -> Tensor:
    """An output that lies in memory token by token, as the op returns it."""
    b, h, s, _ = call.q.shape
    return call.q.new_empty(b, s, h, call.w_uv.shape[1]).transpose(1, 2)


def _merge(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> Tensor:
    """Add a partial result to the total, in place, a few heads at a time, to need little memory; the joint lse."""
    share = torch.sigmoid(part_lse - lse).nan_to_num_(0.0).unsqueeze(-1).to(total.dtype)
    heads = max(1, total.shape[1] * _MERGED_AT_ONCE // max(total.numel() * total.element_size(), 1))
    for i in range(0, total.shape[1], heads):
        some = slice(i, i + heads)
        total[:, some].lerp_(part[:, some].to(total.dtype), share[:, some])
    return torch.logaddexp(lse, part_lse)


class _Buffers:
    """Keys and values of one chunk, expanded into the same memory chunk after chunk."""

    def __init__(self, call: _Call, tokens: int) -> None:
        self.call = call
        b, h, _, d = call.q.shape
        self.keys = call.q.new_empty(b * tokens * h * d)
        self.values = call.q.new_empty(b * tokens * h * call.w_uv.shape[1])
        gaps = d - call.w_uk.shape[1] - (0 if call.k_pe is None else call.k_pe.shape[2])
        if gaps:  # rows of K that come from nowhere are zero
            self.keys.zero_()

    def expand(self, a: int, b: int, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """K ``[B, H, C, D]`` and V ``[B, H, C, V]`` of the tokens a to b. What no query sees is zero instead."""
        call = self.call
        batch, heads, _, d = call.q.shape
        n, v_size, tokens = call.w_uk.shape[1], call.w_uv.shape[1], b - a
        latent, rotary = call.c_kv[:, a:b], None if call.k_pe is None else call.k_pe[:, a:b]
        if visible is not None:
            dead = ~visible.any(dim=1).unsqueeze(-1)
            latent, rotary = latent.masked_fill(dead, 0.0), None if rotary is None else rotary.masked_fill(dead, 0.0)
        k = self.keys[: batch * tokens * heads * d].view(batch * tokens, heads, d)
        v = self.values[: batch * tokens * heads * v_size].view(batch * tokens, heads, v_size)
        rows = latent.reshape(1, batch * tokens, -1).expand(heads, -1, -1)
        k_nope = k[:, :, call.nope_at : call.nope_at + n].transpose(0, 1)
        torch.bmm(rows, call.w_uk.transpose(1, 2), out=k_nope)
        torch.bmm(rows, call.w_uv.transpose(1, 2), out=v.transpose(0, 1))
        k, v = (x.view(batch, tokens, heads, -1) for x in (k, v))
        if rotary is not None:
            _copy_to_heads(k[..., call.pe_at : call.pe_at + rotary.shape[2]], rotary)
        return k.transpose(1, 2), v.transpose(1, 2)


def _copy_to_heads(k: Tensor, rotary: Tensor) -> None:
    """``rotary [B, C, P]`` to every head of ``k [B, C, H, P]``; eight bytes at a time where they lie so."""
    if _of_words(k) and _of_words(rotary):
        k, rotary = k.view(_WORD), rotary.view(_WORD)
    k.copy_(rotary.unsqueeze(2))


def _of_words(x: Tensor) -> bool:
    steps = (*x.stride()[:-1], x.shape[-1], x.storage_offset())
    return x.stride(-1) == 1 and all(step * x.element_size() % _WORD.itemsize == 0 for step in steps)


def _blocks(total: int, size: int) -> Iterator[slice]:
    """Consecutive stretches of at most ``size``."""
    for begin in range(0, total, size):
        yield slice(begin, min(begin + size, total))


def _chunks(first: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(first + part.start, first + part.stop) for part in _blocks(max(end - first, 0), size)]


def _absorbed(
    call: _Call, mask: Tensor | None, start: Tensor | None, length: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention on the latent itself, with both products around it."""
    n = call.w_uk.shape[1]
    q_latent = torch.einsum("bhsn,hnr->bhsr", call.q[..., call.nope_at : call.nope_at + n], call.w_uk)
    q_pe = None if call.k_pe is None else call.q[..., call.pe_at : call.pe_at + call.k_pe.shape[2]]
    tensors = (q_latent, q_pe, call.c_kv, call.k_pe, mask, start, length)
    out, lse = torch.ops.mlacompile.mla_decode(*tensors, scale=call.scale, causal=causal)
    return torch.einsum("bhsr,hvr->bhsv", out, call.w_uv), lse
