"""Portable Triton kernels of ``mla_decode``: each cached token is loaded once, and serves as key and as value.

One program takes a tile of rows (query, head), packed because all heads share the cache, and one stretch of the
context. It keeps queries in shared memory, streams [BLOCK_N, R] tiles of the cache through it, and holds the whole
output tile in registers under an online softmax. With several stretches ("splits") every program leaves a normalized
float32 partial and its log-sum-exp in base 2, and ``_mla_combine_kernel`` merges them.

The host reads no tensor: bounds come from ``start`` and ``length`` on the device, so a CUDA graph can replay a launch.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the hints of kernel parameters itself.)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.7e38)  # a finite additive mask stays finite after the change to base 2


@triton.jit
def _exp2_here(x):
    """2^x that the compiler may not compute again in another layout: only the [BLOCK_H] result should change warps."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=False, pack=1)


@triton.jit
def _narrow_here(x, dtype: tl.constexpr):
    """x in 16 bits, likewise: P crosses shared memory once, as 16 bits, instead of the scores as 32 several times."""
    if dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=False, pack=2
        )
    else:
        y = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, is_pure=False, pack=2)
    return y


@triton.jit
def _visible_rows(p_mask, o_s, o_t, m_t, stride_ms, stride_mt, S, MASK: tl.constexpr):
    """Which tokens of a tile at least one of the queries o_s sees."""
    p = p_mask + o_s[:, None] * stride_ms + o_t[None, :] * stride_mt
    b_m = tl.load(p, mask=(o_s < S)[:, None] & m_t[None, :], other=0 if MASK == 1 else float("-inf"))
    seen = (b_m != 0) if MASK == 1 else (b_m != float("-inf"))
    return tl.max(seen.to(tl.int32), 0) > 0


@triton.jit
def _trim(p_mask, o_s, lo, hi, stride_ms, stride_mt, S, MASK: tl.constexpr, CHUNK: tl.constexpr):
    """The first and past-the-last token in [lo, hi) that the mask shows to any of the queries o_s."""
    first = hi
    last = lo
    for t in range(lo, hi, CHUNK):
        o_t = t + tl.arange(0, CHUNK)
        seen = _visible_rows(p_mask, o_s, o_t, o_t < hi, stride_ms, stride_mt, S, MASK)
        first = tl.minimum(first, tl.min(tl.where(seen, o_t, hi), 0))
        last = tl.maximum(last, tl.max(tl.where(seen, o_t + 1, lo), 0))
    return first, last


@triton.jit
def _dequantize(b_c, p_scale, dtype: tl.constexpr, GROUPS: tl.constexpr):
    """An FP8 tile in 16 (or 32) bits, and one factor a token that is still to be applied (1 when none is).

    One factor a token is exact and free as a factor of scores and weights; one a group has to go into the values.
    """
    GROUP: tl.constexpr = 128
    if GROUPS == 1:
        if b_c.dtype == tl.float8e5:  # straight to bfloat16, NaN would become a number
            b_c = b_c.to(tl.float32)
        return b_c.to(dtype), tl.load(p_scale)
    else:
        N: tl.constexpr = b_c.shape[0]
        WIDTH: tl.constexpr = b_c.shape[1] // GROUP
        o_g = tl.arange(0, WIDTH)
        b_scale = tl.load(p_scale[:, None] + o_g[None, :], mask=(o_g < GROUPS)[None, :], other=0.0)
        b_v = tl.reshape(b_c.to(tl.float32), (N, WIDTH, GROUP)) * b_scale[:, :, None]
        return tl.reshape(b_v.to(dtype), (N, WIDTH * GROUP)), 1.0


@triton.jit
def _fold_tile(
    acc, m_i, l_i, b_q, b_qpe, p_c, p_pe, d_c, d_pe, d_row, p_scale, p_table, p_mask,
    o_s, o_row_s, m_row, limit, t, t_seen, hi, scale_log2, zero,
    stride_cb, stride_ct, stride_kb, stride_kt, stride_fb, stride_ft, stride_ms, stride_mt, S, n_pages,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr,
    ROPE_SCALED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Fold the tokens [t, min(t + BLOCK_N, hi)) into (acc, m, l). t_seen is any token that is seen.

    No row that nobody sees is ever loaded, so there is nothing to zero: a partial tile moves back over rows that are
    seen (TMA, which copies BLOCK_N consecutive rows) or names one seen row many times (pointers).
    """
    o_r = tl.arange(0, BLOCK_R)
    if TMA:
        t_load = tl.minimum(t, hi - BLOCK_N)
        o_t = t_load + tl.arange(0, BLOCK_N)
        live = o_t >= t
        b_c = d_c.load([d_row + t_load, 0])
    else:
        o_t = t + tl.arange(0, BLOCK_N)
        live = o_t < hi
        if MASK != 0:
            live = live & _visible_rows(p_mask, o_s, o_t, live, stride_ms, stride_mt, S, MASK)
        o_load = tl.where(live, o_t, t_seen)
        if PAGE > 0:  # a page number outside the cache means the nearest page
            page = tl.minimum(tl.maximum(tl.load(p_table + o_load // PAGE), 0), n_pages - 1).to(tl.int64)
            o_load = o_load % PAGE
            p_c += (page * stride_cb)[:, None]
            if GROUPS > 0:
                p_scale += page * stride_fb
        p = p_c + o_load[:, None] * stride_ct + o_r[None, :]
        if BLOCK_R == R:
            b_c = tl.load(p)
        else:
            b_c = tl.load(p, mask=(o_r < R)[None, :], other=0.0)
    b_scale = p_scale
    if GROUPS > 0:
        p_scale += o_load * stride_ft
        b_c, b_scale = _dequantize(b_c, p_scale, b_q.dtype, GROUPS)
    b_pe = b_c
    if P > 0:
        o_p = tl.arange(0, BLOCK_P)
        if PAGE > 0:
            p_pe += (page * stride_kb)[:, None]
        if TMA:
            b_pe = d_pe.load([d_row + t_load, 0])
        elif BLOCK_P == P:
            b_pe = tl.load(p_pe + o_load[:, None] * stride_kt + o_p[None, :])
        else:
            b_pe = tl.load(p_pe + o_load[:, None] * stride_kt + o_p[None, :], mask=(o_p < P)[None, :], other=0.0)
    if ROPE_SCALED:
        b_pe = (b_pe.to(tl.float32) * tl.load(p_scale + GROUPS)[:, None]).to(b_q.dtype)
    # Triton gives a product that feeds another one all warps along its rows, so that two warpgroups would compute
    # the same 64. It does not look for the second product across a branch, so the branch spreads them over columns.
    s = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    if WIDE:
        if P > 0:
            if zero < 1:
                s = tl.dot(b_qpe, tl.trans(b_pe), s, input_precision="ieee")
            else:
                s = tl.dot(b_qpe, tl.trans(b_pe), s + 1.0, input_precision="ieee")
        if zero == 0:
            s = tl.dot(b_q, tl.trans(b_c), s, input_precision="ieee")
        else:
            s = tl.dot(b_q, tl.trans(b_c), s + 1.0, input_precision="ieee")
    elif GROUPS == 1:
        s = tl.dot(b_q, tl.trans(b_c), s, input_precision="ieee") * b_scale[None, :]
        if P > 0:
            s = tl.dot(b_qpe, tl.trans(b_pe), s, input_precision="ieee")
    else:
        if P > 0:
            s = tl.dot(b_qpe, tl.trans(b_pe), s, input_precision="ieee")
        s = tl.dot(b_q, tl.trans(b_c), s, input_precision="ieee")
    s = s * scale_log2 + tl.where(live, 0.0, float("-inf"))[None, :]
    if MASK == 2 and o_s.shape[0] == 1:  # one query in the tile: one row of the mask
        b_m = tl.load(p_mask + tl.min(o_s, 0) * stride_ms + o_t * stride_mt, mask=live, other=0.0).to(tl.float32)
        s += tl.maximum(b_m * LOG2E, LOWEST)[None, :]
    elif MASK != 0 and o_s.shape[0] > 1:
        p_m = p_mask + o_row_s[:, None] * stride_ms + o_t[None, :] * stride_mt
        m_m = m_row[:, None] & live[None, :]
        if MASK == 1:
            s = tl.where(tl.load(p_m, mask=m_m, other=0) != 0, s, float("-inf"))
        else:
            b_m = tl.load(p_m, mask=m_m, other=float("-inf")).to(tl.float32)
            s = tl.where(b_m == float("-inf"), float("-inf"), s + tl.maximum(b_m * LOG2E, LOWEST))
    if CAUSAL:
        s = tl.where(o_t[None, :] < limit[:, None], s, float("-inf"))

    m_new = tl.maximum(m_i, tl.max(s, 1))
    if MASK != 0 or CAUSAL:  # a row may have seen nothing yet, and -inf - -inf is NaN
        m_use = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        m_use = m_new
    b_p = tl.exp2(s - m_use[:, None])
    if WIDE:
        alpha = _exp2_here(m_i - m_use)
        l_i = l_i * alpha + tl.sum(b_p, 1)
        b_p = _narrow_here(b_p, b_c.dtype)
    else:
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(b_p, 1)
        if GROUPS == 1:
            b_p = b_p * b_scale[None, :]
        b_p = b_p.to(b_c.dtype)
    acc = tl.dot(b_p, b_c, acc * alpha[:, None], input_precision="ieee")
    m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _mla_decode_kernel(
    p_q, p_qpe, p_c, p_pe, d_c, d_pe, p_scale, p_table, p_mask, p_start, p_length, p_out, p_lse,
    scale_log2, H, S, T, n_pages, d_rows, zero,
    stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
    stride_cb, stride_ct, stride_kb, stride_kt, stride_fb, stride_ft, stride_tb, stride_mb, stride_ms, stride_mt,
    R: tl.constexpr, P: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr,
    ROPE_SCALED: tl.constexpr, TMA: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row tile of one batch row over one split of its context.

    Grid: (row tiles, splits, batch): tiles that read the same tokens run together and share L2.
    MASK: 0 none, 1 bool, 2 additive. PAGE: tokens a page, 0 for a contiguous cache; then b counts pages in stride_cb,
    stride_kb and stride_fb. GROUPS: factors of an FP8 latent, 0 for a cache that has none; ROPE_SCALED: one more for
    the rotary key. TMA: d_c, d_pe describe [rows, R] and [rows, P], d_rows rows a batch row.
    zero: 0, which the compiler must not know.
    """
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    i_b = tl.program_id(2).to(tl.int64)
    if PDL:
        gdc_launch_dependents()

    o_row = i_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    m_row = o_row < H * S
    o_h = o_row % H
    o_row_s = o_row // H
    i_s = (i_tile * BLOCK_H) // H  # the first query of the tile
    o_s = i_s + tl.arange(0, BLOCK_S)

    lo = 0
    hi = T
    if p_start is not None:
        lo = tl.maximum(tl.load(p_start + i_b), 0)
    limit = o_row_s
    if CAUSAL:
        end = T
        if p_length is not None:
            end = tl.load(p_length + i_b)
        s_last = tl.minimum((i_tile * BLOCK_H + BLOCK_H - 1) // H, S - 1)
        hi = tl.minimum(end - S + s_last + 1, T)
        limit = tl.minimum(end - S + o_row_s + 1, T)
    elif p_length is not None:
        hi = tl.minimum(tl.load(p_length + i_b), T)

    # This program's stretch of [lo, hi), a whole number of tiles counted from lo: only the very last can be partial.
    n_seen = hi - lo
    per_split = tl.cdiv(tl.maximum(tl.cdiv(n_seen, BLOCK_N), 0), n_splits)
    lo = lo + i_split * per_split * BLOCK_N
    hi = tl.minimum(hi, lo + per_split * BLOCK_N)
    if MASK != 0:
        p_mask += i_b * stride_mb
        lo, hi = _trim(p_mask, o_s, lo, tl.maximum(lo, hi), stride_ms, stride_mt, S, MASK, 1024 // BLOCK_S)

    o_r = tl.arange(0, BLOCK_R)
    p = p_q + i_b * stride_qb + (o_h * stride_qh + o_row_s * stride_qs)[:, None] + o_r[None, :] * stride_qr
    b_q = tl.load(p, mask=m_row[:, None] & (o_r < R)[None, :], other=0.0)
    b_qpe = b_q
    if P > 0:
        o_p = tl.arange(0, BLOCK_P)
        p = p_qpe + i_b * stride_pb + (o_h * stride_ph + o_row_s * stride_ps)[:, None] + o_p[None, :] * stride_pr
        b_qpe = tl.load(p, mask=m_row[:, None] & (o_p < P)[None, :], other=0.0)
        if PAGE == 0:
            p_pe += i_b * stride_kb
    if PAGE == 0:
        p_c += i_b * stride_cb
        if GROUPS > 0:
            p_scale += i_b * stride_fb
    else:
        p_table += i_b * stride_tb
    d_row = (i_b * d_rows).to(tl.int32)

    acc = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    m_i = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_H,), tl.float32)
    WIDE16: tl.constexpr = p_q.dtype.element_ty.primitive_bitwidth == 16
    if TMA and n_seen < BLOCK_N:  # fewer tokens than TMA copies at once: pointers name rows one by one
        if lo < hi:
            acc, m_i, l_i = _fold_tile(
                acc, m_i, l_i, b_q, b_qpe, p_c, p_pe, d_c, d_pe, d_row, p_scale, p_table, p_mask,
                o_s, o_row_s, m_row, limit, lo, lo, hi, scale_log2, zero,
                stride_cb, stride_ct, stride_kb, stride_kt, stride_fb, stride_ft, stride_ms, stride_mt, S, n_pages,
                R, P, BLOCK_R, BLOCK_P, BLOCK_H, BLOCK_N, MASK, CAUSAL, PAGE, GROUPS, ROPE_SCALED, False, WIDE16,
            )  # fmt: skip
    else:
        for t in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
            acc, m_i, l_i = _fold_tile(
                acc, m_i, l_i, b_q, b_qpe, p_c, p_pe, d_c, d_pe, d_row, p_scale, p_table, p_mask,
                o_s, o_row_s, m_row, limit, t, lo, hi, scale_log2, zero,
                stride_cb, stride_ct, stride_kb, stride_kt, stride_fb, stride_ft, stride_ms, stride_mt, S, n_pages,
                R, P, BLOCK_R, BLOCK_P, BLOCK_H, BLOCK_N, MASK, CAUSAL, PAGE, GROUPS, ROPE_SCALED, TMA, WIDE,
            )  # fmt: skip

    out = acc / tl.where(l_i == 0, 1.0, l_i)[:, None]
    lse = tl.where(l_i == 0, float("-inf"), m_i + tl.log2(l_i))  # m is -inf only where l is 0
    # Rows once more, from a sum the compiler cannot fold: else it keeps them in registers, and there are none left.
    o_row = (i_tile + zero) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_row = o_row < H * S
    if not SPLIT:
        o_h = o_row % H
        o_row_s = o_row // H
        o_out = (i_b * H + o_h) * S + o_row_s
        tl.store(p_lse + o_out, lse * LN2, mask=m_row)
    else:
        o_out = (i_split * tl.num_programs(2) + i_b) * (H * S) + o_row
        tl.store(p_lse + o_out, lse, mask=m_row)
        m_row = m_row & (lo < hi)  # the combine skips a partial whose lse is -inf
    o_r = zero + tl.arange(0, BLOCK_R)
    p = p_out + o_out[:, None] * R + o_r[None, :]
    tl.store(p, out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_r < R)[None, :])


@triton.jit
def _partials(p_part, o_part, m_part, i_row, n_rows, o_c, R: tl.constexpr):
    """Columns o_c of one row, of several parts."""
    p = p_part + (o_part[:, None].to(tl.int64) * n_rows + i_row) * R + o_c[None, :]
    return tl.load(p, mask=m_part[:, None] & (o_c < R)[None, :], other=0.0)


@triton.jit
def _mla_combine_kernel(
    p_part, p_part_lse, p_out, p_lse, n_rows, n_splits, H, S,
    R: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = sum of partials weighted by 2^(lse - max lse). Grid: (batch * rows, column chunks)."""
    i_row = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    o_split = tl.arange(0, BLOCK_SPLITS)
    if BLOCK_SPLITS <= CHUNK:  # before the sums: both loads are then under way together
        part = _partials(p_part, o_split, o_split < n_splits, i_row, n_rows, o_c, R)
    lse = tl.load(p_part_lse + o_split * n_rows + i_row, mask=o_split < n_splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(lse - peak)
    total = tl.sum(weight, 0)
    if BLOCK_SPLITS <= CHUNK:
        written = (lse != float("-inf"))[:, None]  # what was not written may be anything
        acc = tl.sum(tl.where(written, part, 0.0) * weight[:, None], 0)
    else:
        acc = tl.zeros((BLOCK_C,), tl.float32)
        for split in range(0, n_splits, CHUNK):
            o_part = split + tl.arange(0, CHUNK)
            part_lse = tl.load(p_part_lse + o_part * n_rows + i_row, mask=o_part < n_splits, other=float("-inf"))
            part = _partials(p_part, o_part, part_lse != float("-inf"), i_row, n_rows, o_c, R)
            acc += tl.sum(part * tl.exp2(part_lse - peak)[:, None], 0)
    out = acc / tl.where(total == 0, 1.0, total)

    # Partials are ordered (query, head), the output is (head, query).
    i_b = (i_row // (H * S)).to(tl.int64)
    i_in = i_row % (H * S)
    o_out = (i_b * H + i_in % H) * S + i_in // H
    tl.store(p_out + o_out * R + o_c, out.to(p_out.dtype.element_ty), mask=o_c < R)
    if tl.program_id(1) == 0:
        tl.store(p_lse + o_out, (peak + tl.log2(total)) * LN2)
