"""The Triton kernel of ``absorb_and_write``: a program has what one of ``write_latents`` has, or a tile of the product.

    programs [0, writes)    tokens that are written, heads whose queries are rotated
    the others              BLOCK_N rows of the weight of a head × BLOCK_M rows of its queries

Nothing passes between programs.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mlacompile.kernels.fp8_linear.tiles import _tile
from mlacompile.kernels.write_latents.portable import _write_step


@triton.jit
def _absorb_and_write_kernel(
    p_latent, p_norm, p_k, p_q, p_factors, p_slots, p_into, p_scales, p_keys, p_out,
    stride_lb, stride_ls, stride_kb, stride_ks, stride_qb, stride_qh, stride_qs,
    stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B, S, T, H, eps,
    writes, d_x, d_w, p_descale, p_absorbed, M, N, K, stride_dh, stride_dn, blocks_n, blocks_m,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, LARGEST: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Arguments up to eps: of ``_write_latents_kernel``. d_x, d_w: descriptors of [H, M, K] and [H, N, K]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    if program < writes:
        _write_step(
            program, p_latent, p_norm, p_k, p_q, p_factors, p_slots, p_into, p_scales, p_keys, p_out,
            stride_lb, stride_ls, stride_kb, stride_ks, stride_qb, stride_qh, stride_qs,
            stride_ib, stride_it, stride_sb, stride_st, stride_yb, stride_yt, B, S, T, H, eps,
            R, P, BLOCK_R, BLOCK_P, BLOCK_H, GROUP, LARGEST, PAIRS,
        )  # fmt: skip
    else:
        tile = program - writes
        i_n = tile % blocks_n
        i_m = tile // blocks_n % blocks_m
        _tile(
            i_n, i_m, tile // (blocks_n * blocks_m), d_x, None, d_w, p_descale, d_w, p_descale, p_absorbed,
            M, N, N, K, K, 0, 0, 0, stride_dh, stride_dn, stride_dn, M * N,
            BLOCK_M, BLOCK_N, True, False, STAGES, False, False,
        )  # fmt: skip
