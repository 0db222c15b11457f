"""Gluon kernel of ``fp8_linear`` for one to four rows: weights are read once, in 16-byte pieces, at memory speed.

    program:  BLOCK_N rows of one weight, all of K in steps of one piece a thread

Written in Gluon for its layouts alone: a thread multiplies the columns that it loads itself, of the weight and of x, so
that nothing passes through shared memory until the sum over threads at the end. The scale of a block is folded into x
once and serves all rows of the program, which lie in one row of blocks.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _fp8_rows_kernel(
    p_x, p_x_descale, p_w, p_descale, p_out, M, N, K,
    stride_xb, stride_xm, stride_xsb, stride_xsm, stride_xsk, stride_wb, stride_wn, stride_sb, stride_sn,
    ROWS: gl.constexpr, ROWS_A_THREAD: gl.constexpr, WIDTH: gl.constexpr, LANES: gl.constexpr,
    WARPS_K: gl.constexpr, EVEN_K: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, heads). LANES and WARPS_K: threads of a warp, and warps, that divide K among themselves;
    the others have rows of their own. ROWS: M rounded up to a power of two. x is quantized if it has descales."""
    SHARES: gl.constexpr = 32 // LANES
    BLOCK_N: gl.constexpr = ROWS_A_THREAD * SHARES * (num_warps // WARPS_K)
    PIECES: gl.constexpr = LANES * WARPS_K
    layout: gl.constexpr = gl.BlockedLayout(
        [ROWS, ROWS_A_THREAD, 1, WIDTH], [1, SHARES, LANES, 1], [1, num_warps // WARPS_K, WARPS_K, 1], [3, 2, 1, 0]
    )
    l_w: gl.constexpr = gl.SliceLayout(0, layout)  # rows of the weight, pieces, columns of a piece
    l_x: gl.constexpr = gl.SliceLayout(1, layout)  # rows of x, pieces, columns
    l_k: gl.constexpr = gl.SliceLayout(0, l_x)
    l_out: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, layout))
    i_b = gl.program_id(1).to(gl.int64)
    first = gl.program_id(0) * BLOCK_N

    o_n = gl.minimum(first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(2, l_w))), N - 1).to(gl.int64)
    o_m = gl.minimum(gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, l_x))), M - 1)
    o_piece = gl.arange(0, PIECES, gl.SliceLayout(1, l_k)) * WIDTH
    o_kx = gl.expand_dims(o_piece, 1) + gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, l_k)), 0)
    o_s = gl.convert_layout(o_piece, gl.SliceLayout(0, gl.SliceLayout(2, l_x)))
    o_kw = gl.convert_layout(o_kx, gl.SliceLayout(0, l_w))
    p_w += i_b * stride_wb
    p_x += i_b * stride_xb
    p_w = p_w + gl.expand_dims(gl.expand_dims(o_n * stride_wn, 1), 2) + gl.expand_dims(o_kw, 0)
    p_x = p_x + gl.expand_dims(gl.expand_dims(o_m * stride_xm, 1), 2) + gl.expand_dims(o_kx, 0)
    p_descale += i_b * stride_sb + (first // 128) * stride_sn
    if p_x_descale is not None:
        o_ms = gl.minimum(gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, l_x))), M - 1)
        p_x_descale += i_b * stride_xsb
        p_x_descale = p_x_descale + gl.expand_dims(o_ms * stride_xsm, 1)

    acc = gl.zeros([ROWS, BLOCK_N, PIECES, WIDTH], gl.float32, layout)
    for k in range(0, K, PIECES * WIDTH):
        group = (k + o_s) // 128
        if EVEN_K:
            b_w = gl.load(p_w + k, eviction_policy="evict_first")
            b_x = gl.load(p_x + k)
            factor = gl.expand_dims(gl.load(p_descale + group), 0)
        else:
            b_w = gl.load(p_w + k, mask=gl.expand_dims(k + o_kw < K, 0), other=0.0, eviction_policy="evict_first")
            b_x = gl.load(p_x + k, mask=gl.expand_dims(k + o_kx < K, 0), other=0.0)
            factor = gl.expand_dims(gl.load(p_descale + group, mask=k + o_s < K, other=0.0), 0)
        if p_x_descale is not None:
            m_s = gl.expand_dims(k + o_s < K, 0)
            factor = factor * gl.load(p_x_descale + gl.expand_dims(group * stride_xsk, 0), mask=m_s, other=0.0)
        b_x = b_x.to(gl.float32) * gl.expand_dims(factor, 2)
        acc += gl.expand_dims(b_w.to(gl.float32), 0) * gl.expand_dims(b_x, 1)
    out = gl.sum(gl.sum(acc, 3), 2)

    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, l_out))
    o_col = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, l_out))
    p_out += i_b * M * N
    p_out = p_out + gl.expand_dims(o_row * N, 1) + gl.expand_dims(o_col, 0)
    m_out = gl.expand_dims(o_row < M, 1) & gl.expand_dims(o_col < N, 0)
    gl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_out)
