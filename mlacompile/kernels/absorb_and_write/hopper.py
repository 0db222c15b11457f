"""The Hopper kernel of ``absorb_and_write``: while a program's products are on their way, it has time for the rest.

    _multiply_head    8 warps   a head of the product (``fp8_linear/heads.py``)
    _write_tokens     4 warps   a program's share of the tokens
    _rotate_queries   4 warps   and of the heads, with TOKENS tokens of each

None waits for another, nor for a launch.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# No "from __future__ import annotations": as in the kernel of products of heads.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlacompile.kernels.fp8_linear.heads import _head_room, _multiply_head, _send_for
from mlacompile.kernels.hopper import _launch_later, _wait_for_earlier
from mlacompile.kernels.write_latents.portable import _partners

SMALLEST = gl.constexpr(2.0**-126)  # descale of ``fp8_quantize``
INFINITY = gl.constexpr(0x7F800000)  # the bits of one in float32


@gluon.constexpr_function
def _across(columns):
    """Rows of so many values, a power of two, up to four of them a thread."""
    each = min(4, columns)
    lanes = min(32, columns // each)
    warps = min(4, columns // (each * lanes))
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [4 // warps, warps], [1, 0])


@gluon.jit
def _rotate(p_q, p_factors, p_out, job, stride_qb, stride_qh, stride_qs, tokens, S, H, P: gl.constexpr,
            BLOCK_P: gl.constexpr, TOKENS: gl.constexpr, PAIRS: gl.constexpr):  # fmt: skip
    """A head's queries of TOKENS tokens, of which the job says which."""
    layout: gl.constexpr = _across(BLOCK_P)
    h = job % H
    o_i = job // H * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, layout))
    o_p = gl.arange(0, BLOCK_P, gl.SliceLayout(0, layout))
    mask = (o_i < tokens)[:, None] & (o_p < P)[None, :]
    first, second = _partners(o_p, P, PAIRS)
    b, s = (o_i // S).to(gl.int64), o_i % S
    row = (b * stride_qb + s * stride_qs + h.to(gl.int64) * stride_qh)[:, None]
    at = o_i[:, None] * P + o_p[None, :]
    one = gl.load(p_factors + at, mask=mask, other=0.0)
    two = gl.load(p_factors + tokens * P + at, mask=mask, other=0.0)
    q_one = gl.load(p_q + (row + first[None, :]), mask=mask, other=0.0).to(gl.float32)
    q_two = gl.load(p_q + (row + second[None, :]), mask=mask, other=0.0).to(gl.float32)
    q = one * q_one + two * q_two
    to = (((b * H + h) * S + s) * P)[:, None] + o_p[None, :]
    gl.store(p_out + to, q.to(p_out.dtype.element_ty), mask=mask)


@gluon.jit
def _quantized(x, LARGEST: gl.constexpr):
    """Groups x divided by their scales, and these scales, as ``fp8_quantize`` defines them."""
    # As integers sizes are in the same order, and what is not finite is the largest.
    bits = gl.max(gl.abs(x).to(gl.int32, bitcast=True), 1)
    peak = bits.to(gl.float32, bitcast=True)
    largest = gl.full(peak.shape, LARGEST, gl.float32, peak.type.layout)
    descale = gl.where(bits == 0, 1.0, gl.maximum(gl.div_rn(peak, largest), SMALLEST))
    descale = gl.where(bits < INFINITY, descale, float("nan"))
    x, wide = gl.broadcast(x, descale[:, None])
    q = gl.div_rn(x, wide)
    # What is NaN passes both comparisons and stays NaN.
    q = gl.where(q > LARGEST, LARGEST, q)
    q = gl.where(q < -LARGEST, -LARGEST, q)
    return q, descale


@gluon.jit
def _write_token(
    p_latent, p_norm, p_k, p_factors, p_slots, p_into, p_scales, p_keys, i,
    stride_lb, stride_ls, stride_kb, stride_ks, stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt,
    tokens, S, T, eps, R: gl.constexpr, P: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_P: gl.constexpr,
    GROUP: gl.constexpr, LARGEST: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Token i: its latent normalized, quantized and written, its rotary key rotated and written."""
    layout: gl.constexpr = _across(GROUP)
    flat: gl.constexpr = gl.SliceLayout(0, _across(BLOCK_P))
    GROUPS: gl.constexpr = BLOCK_R // GROUP
    b, s = (i // S).to(gl.int64), i % S
    o_g = gl.arange(0, GROUPS, gl.SliceLayout(1, layout))
    o_r = o_g[:, None] * GROUP + gl.arange(0, GROUP, gl.SliceLayout(0, layout))[None, :]
    m_r = o_r < R
    # All that is read is sent for before any of it is used.
    slot = gl.load(p_slots + s)
    x = gl.load(p_latent + (b * stride_lb + s * stride_ls + o_r), mask=m_r, other=0.0)
    if p_norm is not None:
        weight = gl.load(p_norm + o_r, mask=m_r, other=0.0)
    if p_k is not None:
        o_p = gl.arange(0, BLOCK_P, flat)
        m_p = o_p < P
        p_k += b * stride_kb + s * stride_ks
        if p_factors is not None:
            first, second = _partners(o_p, P, PAIRS)
            one = gl.load(p_factors + (i * P + o_p), mask=m_p, other=0.0)
            two = gl.load(p_factors + ((tokens + i) * P + o_p), mask=m_p, other=0.0)
            k_one, k_two = gl.load(p_k + first, mask=m_p, other=0.0), gl.load(p_k + second, mask=m_p, other=0.0)
        else:
            k = gl.load(p_k + o_p, mask=m_p, other=0.0)
    inside = (slot >= 0) & (slot < T)
    gl.device_assert(inside, "write_latents: the cache has no such row")
    x = x.to(gl.float32)
    if p_norm is not None:
        x = x * (1.0 / gl.sqrt_rn(gl.sum(gl.sum(x * x, 1), 0) / R + eps)) * weight.to(gl.float32)
    if p_scales is not None:
        x, descale = _quantized(x, LARGEST)
        gl.store(p_scales + (b * stride_sb + slot * stride_st + o_g), descale, mask=inside & (o_g * GROUP < R))
    gl.store(p_into + (b * stride_ib + slot * stride_it + o_r), x.to(p_into.dtype.element_ty), mask=inside & m_r)
    if p_k is not None:
        if p_factors is not None:
            k = one * k_one.to(gl.float32)
            k += two * k_two.to(gl.float32)
        gl.store(p_keys + (b * stride_yb + slot * stride_yt + o_p), k.to(p_keys.dtype.element_ty), mask=inside & m_p)


@gluon.jit
def _write_tokens(
    p_latent, p_norm, p_k, p_factors, p_slots, p_into, p_scales, p_keys, stride_lb, stride_ls, stride_kb, stride_ks,
    stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B, S, T, eps, R: gl.constexpr, P: gl.constexpr,
    BLOCK_R: gl.constexpr, BLOCK_P: gl.constexpr, GROUP: gl.constexpr, LARGEST: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """The program's share of all tokens."""
    for i in range(gl.program_id(0), B * S, gl.num_programs(0)):
        _write_token(
            p_latent, p_norm, p_k, p_factors, p_slots, p_into, p_scales, p_keys, i, stride_lb, stride_ls, stride_kb,
            stride_ks, stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B * S, S, T, eps,
            R, P, BLOCK_R, BLOCK_P, GROUP, LARGEST, PAIRS,
        )  # fmt: skip


@gluon.jit
def _rotate_queries(p_q, p_factors, p_out, stride_qb, stride_qh, stride_qs, B, S, H, P: gl.constexpr,
                    BLOCK_P: gl.constexpr, TOKENS: gl.constexpr, PAIRS: gl.constexpr):  # fmt: skip
    """The program's share of all heads, of TOKENS tokens each."""
    if p_q is not None:
        for job in range(gl.program_id(0), H * gl.cdiv(B * S, TOKENS), gl.num_programs(0)):
            _rotate(p_q, p_factors, p_out, job, stride_qb, stride_qh, stride_qs, B * S, S, H, P, BLOCK_P, TOKENS, PAIRS)


@gluon.jit
def _absorb_and_write_hopper_kernel(
    p_latent, p_norm, p_k, p_q, p_factors, p_slots, p_into, p_scales, p_keys, p_out,
    stride_lb, stride_ls, stride_kb, stride_ks, stride_qb, stride_qh, stride_qs,
    stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B, S, T, H, eps,
    d_x, d_w, p_descale, d_out, M, stride_dh, stride_dn, N: gl.constexpr, K: gl.constexpr,
    R: gl.constexpr, P: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_P: gl.constexpr, GROUP: gl.constexpr,
    LARGEST: gl.constexpr, PAIRS: gl.constexpr, TOKENS: gl.constexpr, REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (heads of the product,). Arguments up to eps: of ``_write_latents_kernel``, then of ``_fp8_heads_kernel``.
    TOKENS: whose queries are rotated at once."""
    head = _head_room(d_x, d_w, N, K)
    h = gl.program_id(0)
    _launch_later()
    _wait_for_earlier()
    _send_for(head, d_x, d_w, h, N, K)
    gl.warp_specialize(
        [
            (_multiply_head, (head, d_out, None, None, None, p_descale + h * stride_dh, h, M, 0, stride_dn, 0, N, K)),
            (_write_tokens, (p_latent, p_norm, p_k, p_factors, p_slots, p_into, p_scales, p_keys, stride_lb, stride_ls,
                             stride_kb, stride_ks, stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B,
                             S, T, eps, R, P, BLOCK_R, BLOCK_P, GROUP, LARGEST, PAIRS)),
            (_rotate_queries, (p_q, p_factors, p_out, stride_qb, stride_qh, stride_qs, B, S, H, P, BLOCK_P, TOKENS,
                               PAIRS)),
        ],
        [4, 4],
        [REGS, REGS],
    )  # fmt: skip
