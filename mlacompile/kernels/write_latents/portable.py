"""Triton kernel of ``write_latents``: one token or the queries of a few heads a program, all of it in registers.

    programs [0, B · S)     a token: its latent normalized, quantized and written, its rotary key rotated and written
    the others              BLOCK_H heads of a token: their queries rotated

The whole step is a few kilobytes, so its time is that of a launch and of two dependent reads. Nothing passes between
programs.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the hints of kernel parameters itself.)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: The smallest descale of ``fp8_quantize``, 2**-126, and the bits of an infinity in float32.
_SMALLEST = tl.constexpr(2.0**-126)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _partners(o_p, P: tl.constexpr, PAIRS: tl.constexpr):
    """Which two values make the values o_p. Operators alone: a kernel in Gluon can call it, too."""
    if PAIRS == "interleaved":
        first = o_p - o_p % 2
        second = first + 1
    elif PAIRS == "halves":
        first = o_p % (P // 2)
        second = first + P // 2
    else:  # interleaved to halves
        first = o_p % (P // 2) * 2
        second = first + 1
    return first, second


@triton.jit
def _quantized(x, GROUP: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """x ``[BLOCK]`` divided by the scales of its groups, and these scales, as ``fp8_quantize`` defines them."""
    x = tl.reshape(x, (BLOCK // GROUP, GROUP))
    # As integers sizes are in the same order, and what is not finite is the largest.
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1)
    peak = bits.to(tl.float32, bitcast=True)
    descale = tl.where(bits == 0, 1.0, tl.maximum(tl.div_rn(peak, LARGEST), _SMALLEST))
    descale = tl.where(bits < _INFINITY, descale, float("nan"))
    wide = tl.broadcast_to(descale[:, None], (BLOCK // GROUP, GROUP))
    q = tl.div_rn(x, wide)
    # What is NaN passes both comparisons and stays NaN.
    q = tl.where(q > LARGEST, LARGEST, q)
    q = tl.where(q < -LARGEST, -LARGEST, q)
    return tl.reshape(q, (BLOCK,)), descale


@triton.jit
def _write_token(
    p_latent, p_norm, p_k, p_factors, p_slots, p_into, p_scales, p_keys, b, s, i,
    stride_lb, stride_ls, stride_kb, stride_ks, stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt,
    tokens, T, eps,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
    LARGEST: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Token i, which is s of sequence b: its latent and its rotary key."""
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    # All that is read is sent for before any of it is used.
    slot = tl.load(p_slots + s)
    x = tl.load(p_latent + b * stride_lb + s * stride_ls + o_r, mask=m_r, other=0.0)
    if p_norm is not None:
        weight = tl.load(p_norm + o_r, mask=m_r, other=0.0)
    if p_k is not None:
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < P
        p_k += b * stride_kb + s * stride_ks
        if p_factors is not None:
            first, second = _partners(o_p, P, PAIRS)
            one, two = _factors(p_factors, i, tokens, o_p, m_p, P)
            k_one, k_two = tl.load(p_k + first, mask=m_p, other=0.0), tl.load(p_k + second, mask=m_p, other=0.0)
        else:
            k = tl.load(p_k + o_p, mask=m_p, other=0.0)
    inside = (slot >= 0) & (slot < T)
    tl.device_assert(inside, "write_latents: the cache has no such row")
    x = x.to(tl.float32)
    if p_norm is not None:
        x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / R + eps)) * weight.to(tl.float32)
    if p_scales is not None:
        x, descale = _quantized(x, GROUP, BLOCK_R, LARGEST)
        o_g = tl.arange(0, BLOCK_R // GROUP)
        tl.store(p_scales + b * stride_sb + slot * stride_st + o_g, descale, mask=inside & (o_g * GROUP < R))
    tl.store(p_into + b * stride_ib + slot * stride_it + o_r, x.to(p_into.dtype.element_ty), mask=inside & m_r)
    if p_k is not None:
        if p_factors is not None:
            k = one * k_one.to(tl.float32)
            k += two * k_two.to(tl.float32)
        tl.store(p_keys + b * stride_yb + slot * stride_yt + o_p, k.to(p_keys.dtype.element_ty), mask=inside & m_p)


@triton.jit
def _factors(p_factors, i, tokens, o_p, m_p, P: tl.constexpr):
    """What the two values of each pair of token i are multiplied with."""
    one = tl.load(p_factors + i * P + o_p, mask=m_p, other=0.0)
    return one, tl.load(p_factors + (tokens + i) * P + o_p, mask=m_p, other=0.0)


@triton.jit
def _rotate_queries(
    p_q, p_factors, p_out, b, s, i, block, stride_qb, stride_qh, stride_qs, tokens, S, H,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of token i, which is s of sequence b."""
    o_p = tl.arange(0, BLOCK_P)
    o_h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    m_p = o_p < P
    mask = (o_h < H)[:, None] & m_p[None, :]
    first, second = _partners(o_p, P, PAIRS)
    one, two = _factors(p_factors, i, tokens, o_p, m_p, P)
    p = p_q + b * stride_qb + s * stride_qs + o_h[:, None] * stride_qh
    q = one[None, :] * _value(p + first[None, :], mask) + two[None, :] * _value(p + second[None, :], mask)
    tl.store(p_out + ((b * H + o_h[:, None]) * S + s) * P + o_p[None, :], q.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _value(p, mask):
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write_step(
    program, p_latent, p_norm, p_k, p_q, p_factors, p_slots, p_into, p_scales, p_keys, p_out,
    stride_lb, stride_ls, stride_kb, stride_ks, stride_qb, stride_qh, stride_qs,
    stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B, S, T, H, eps,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, LARGEST: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """What the program of that number does of B · S · (1 + ⌈H / BLOCK_H⌉)."""
    tokens = B * S
    if program < tokens:
        _write_token(
            p_latent, p_norm, p_k, p_factors, p_slots, p_into, p_scales, p_keys,
            (program // S).to(tl.int64), program % S, program, stride_lb, stride_ls, stride_kb, stride_ks,
            stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, tokens, T, eps,
            R, P, BLOCK_R, BLOCK_P, GROUP, LARGEST, PAIRS,
        )  # fmt: skip
    elif p_q is not None:
        blocks = tl.cdiv(H, BLOCK_H)
        i = (program - tokens) // blocks
        _rotate_queries(
            p_q, p_factors, p_out, (i // S).to(tl.int64), i % S, i, (program - tokens) % blocks,
            stride_qb, stride_qh, stride_qs, tokens, S, H, P, BLOCK_P, BLOCK_H, PAIRS,
        )  # fmt: skip


@triton.jit
def _write_latents_kernel(
    p_latent, p_norm, p_k, p_q, p_factors, p_slots, p_into, p_scales, p_keys, p_out,
    stride_lb, stride_ls, stride_kb, stride_ks, stride_qb, stride_qh, stride_qs,
    stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B, S, T, H, eps,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, LARGEST: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """p_norm, p_factors: or None. p_scales: None where nothing is quantized. p_k, p_keys: None without rotary keys."""
    if PDL:  # launched while the kernel before it ends, as the next one is while this one runs
        gdc_launch_dependents()
        gdc_wait()
    _write_step(
        tl.program_id(0), p_latent, p_norm, p_k, p_q, p_factors, p_slots, p_into, p_scales, p_keys, p_out,
        stride_lb, stride_ls, stride_kb, stride_ks, stride_qb, stride_qh, stride_qs,
        stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B, S, T, H, eps,
        R, P, BLOCK_R, BLOCK_P, BLOCK_H, GROUP, LARGEST, PAIRS,
    )  # fmt: skip
