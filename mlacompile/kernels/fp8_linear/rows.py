"""Gluon kernel of ``fp8_linear`` and ``row_product`` for one or two rows: FP8 weights are read once, in 16-byte pieces.

    program:  BLOCK_N rows of one weight (GATE: of both), all of K in steps of UNROLL pieces a thread

Written in Gluon for its layouts alone: a thread multiplies the columns that it loads itself, of the weight and of x, so
that nothing passes through shared memory until the sum over threads at the end. A piece lies in one block of 128: its
16 products are summed first, and the sum multiplied by the scale. So a thread keeps one sum for each of its rows and
pieces, and its registers are left for loads in flight, which are what reads memory fast.

Two weights that multiply the same row share a launch. A norm is a factor that every program finds for itself: the sum
of squares comes with the row that it reads anyway.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _row_sums(
    p_x, p_x_descale, p_g, p_w, p_descale, p_w2, p_descale2, first, M, N, K,
    stride_xm, stride_xsm, stride_xsk, stride_wn, stride_sn, stride_wn2, stride_sn2, eps,
    BLOCK_N: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr, EVEN_K: gl.constexpr, PAIR: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Rows ``first …`` of one weight, and with PAIR of another, times the rows of x: [rows of x, BLOCK_N] each."""
    ROWS: gl.constexpr = layout.size_per_thread[0]
    l_w: gl.constexpr = gl.SliceLayout(0, layout)  # rows of the weight, pieces, columns of a piece
    l_x: gl.constexpr = gl.SliceLayout(1, layout)  # rows of x, pieces, columns
    l_k: gl.constexpr = gl.SliceLayout(0, l_x)
    l_sum: gl.constexpr = gl.SliceLayout(3, layout)  # rows of x, rows of the weight, pieces
    l_piece: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, l_sum))

    o_n = gl.minimum(first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(2, l_w))), N - 1).to(gl.int64)
    o_m = gl.minimum(gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, l_x))), M - 1)
    o_kx = gl.expand_dims(gl.arange(0, PIECES, gl.SliceLayout(1, l_k)) * WIDTH, 1)
    o_kx += gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, l_k)), 0)
    o_kw = gl.convert_layout(o_kx, gl.SliceLayout(0, l_w))
    o_s = gl.arange(0, PIECES, l_piece) * WIDTH
    o_g = gl.expand_dims(o_kx, 0)
    p = p_w + gl.expand_dims(gl.expand_dims(o_n * stride_wn, 1), 2) + gl.expand_dims(o_kw, 0)
    p2 = p_w2 + gl.expand_dims(gl.expand_dims(o_n * stride_wn2, 1), 2) + gl.expand_dims(o_kw, 0)
    p_x = p_x + gl.expand_dims(gl.expand_dims(o_m * stride_xm, 1), 2) + o_g
    p_descale += (first // 128) * stride_sn
    p_descale2 += (first // 128) * stride_sn2
    if p_x_descale is not None:
        o_ms = gl.minimum(gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, l_sum))), M - 1)
        p_x_descale = p_x_descale + gl.expand_dims(gl.expand_dims(o_ms * stride_xsm, 1), 2)

    acc = gl.zeros([ROWS, BLOCK_N, PIECES], gl.float32, l_sum)
    acc2 = gl.zeros([ROWS, BLOCK_N, PIECES], gl.float32, l_sum)
    squares = gl.zeros([ROWS, PIECES], gl.float32, gl.SliceLayout(2, l_x))
    for k in range(0, K, PIECES * WIDTH):
        group = (k + o_s) // 128
        m_s = k + o_s < K
        b_w2 = acc2
        if EVEN_K:
            b_w = gl.load(p + k, eviction_policy="evict_first")
            if PAIR:
                b_w2 = gl.load(p2 + k, eviction_policy="evict_first")
            b_x = gl.load(p_x + k).to(gl.float32)
        else:
            m_w = gl.expand_dims(k + o_kw < K, 0)
            b_w = gl.load(p + k, mask=m_w, other=0.0, eviction_policy="evict_first")
            if PAIR:
                b_w2 = gl.load(p2 + k, mask=m_w, other=0.0, eviction_policy="evict_first")
            b_x = gl.load(p_x + k, mask=k + o_g < K, other=0.0).to(gl.float32)
        factor = gl.expand_dims(gl.expand_dims(gl.load(p_descale + group, mask=m_s, other=0.0), 0), 1)
        if PAIR:
            factor2 = gl.expand_dims(gl.expand_dims(gl.load(p_descale2 + group, mask=m_s, other=0.0), 0), 1)
        if p_x_descale is not None:
            m_x = gl.expand_dims(gl.expand_dims(m_s, 0), 1)
            x_descale = gl.load(
                p_x_descale + gl.expand_dims(gl.expand_dims(group * stride_xsk, 0), 1), mask=m_x, other=0.0
            )
            factor = factor * x_descale
            if PAIR:
                factor2 = factor2 * x_descale
        if p_g is not None:
            squares += gl.sum(b_x * b_x, 2)
            b_x *= gl.load(p_g + k + o_g, mask=k + o_g < K, other=0.0).to(gl.float32)
        b_x = gl.expand_dims(b_x, 1)
        acc += gl.sum(gl.expand_dims(b_w.to(gl.float32), 0) * b_x, 3) * factor
        if PAIR:
            acc2 += gl.sum(gl.expand_dims(b_w2.to(gl.float32), 0) * b_x, 3) * factor2
    total, total2 = gl.sum(acc, 2), gl.sum(acc2, 2)
    if p_g is not None:
        scale = 1.0 / gl.sqrt_rn(gl.sum(squares, 1) / K + eps)
        scale = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, gl.SliceLayout(2, l_sum))), 1)
        total *= scale
        total2 *= scale
    return total, total2


@gluon.jit
def _activated(x, GATE: gl.constexpr):
    if GATE == "silu":
        return x / (1.0 + gl.exp(-x))
    elif GATE == "gelu":
        return 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    else:
        gl.static_assert(GATE == "gelu_tanh")
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + gl.exp(-2.0 * inner))  # 0.5 · (1 + tanh(u)) is 1 / (1 + exp(−2u))


@gluon.jit
def _rows(
    p_x, p_x_descale, p_g, p_w, p_descale, p_w2, p_descale2, p_added, p_out, i, M, N, K,
    stride_xm, stride_xsm, stride_xsk, stride_wn, stride_sn, stride_wn2, stride_sn2, eps,
    BLOCK_N: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr, EVEN_K: gl.constexpr, GATE: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = layout.size_per_thread[0]
    l_out: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, layout))
    first = i * BLOCK_N
    total, total2 = _row_sums(
        p_x, p_x_descale, p_g, p_w, p_descale, p_w2, p_descale2, first, M, N, K,
        stride_xm, stride_xsm, stride_xsk, stride_wn, stride_sn, stride_wn2, stride_sn2, eps,
        BLOCK_N, PIECES, WIDTH, EVEN_K, GATE != "", layout,
    )  # fmt: skip
    if GATE != "":
        total = _activated(total, GATE) * total2
    o_row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, l_out)), 1)
    o_col = gl.expand_dims(first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, l_out)), 0)
    mask = (o_row < M) & (o_col < N)
    if p_added is not None:
        total += gl.load(p_added + o_row * N + o_col, mask=mask, other=0.0).to(gl.float32)
    gl.store(p_out + o_row * N + o_col, total.to(p_out.dtype.element_ty), mask=mask)


@gluon.jit
def _fp8_rows_kernel(
    p_x, p_x_descale, p_g, p_added, p_w, p_descale, p_out, N, p_w2, p_descale2, p_out2, N2, M, K, eps,
    stride_xb, stride_xm, stride_xsb, stride_xsm, stride_xsk,
    stride_wb, stride_wn, stride_sb, stride_sn, stride_wn2, stride_sn2,
    ROWS: gl.constexpr, ROWS_A_THREAD: gl.constexpr, WIDTH: gl.constexpr, LANES: gl.constexpr,
    WARPS_K: gl.constexpr, UNROLL: gl.constexpr, EVEN_K: gl.constexpr, TWO: gl.constexpr, GATE: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: (row blocks of the first weight, then with TWO those of the second; heads).

    ROWS: M rounded up to a power of two. LANES and WARPS_K: threads of a warp, and warps, that divide K among
    themselves; the others have rows of their own. x is quantized if it has descales. p_g: the weight of an RMS norm of
    x, or None. p_added: rows added to the result, or None.
    """
    SHARES: gl.constexpr = 32 // LANES
    BLOCK_N: gl.constexpr = ROWS_A_THREAD * SHARES * (num_warps // WARPS_K)
    PIECES: gl.constexpr = LANES * WARPS_K * UNROLL
    layout: gl.constexpr = gl.BlockedLayout(
        [ROWS, ROWS_A_THREAD, 1, WIDTH], [1, SHARES, LANES, 1], [1, num_warps // WARPS_K, WARPS_K, 1], [3, 2, 1, 0]
    )
    i = gl.program_id(0)
    i_b = gl.program_id(1).to(gl.int64)
    p_x += i_b * stride_xb
    p_w += i_b * stride_wb
    p_descale += i_b * stride_sb
    p_out += i_b * M * N
    if p_x_descale is not None:
        p_x_descale += i_b * stride_xsb
    if TWO:
        n_first = gl.cdiv(N, BLOCK_N)
        if i < n_first:
            _rows(
                p_x, p_x_descale, p_g, p_w, p_descale, p_w, p_descale, p_added, p_out, i, M, N, K,
                stride_xm, stride_xsm, stride_xsk, stride_wn, stride_sn, stride_wn, stride_sn, eps,
                BLOCK_N, PIECES, WIDTH, EVEN_K, GATE, layout,
            )  # fmt: skip
        else:
            _rows(
                p_x, p_x_descale, p_g, p_w2, p_descale2, p_w2, p_descale2, p_added, p_out2, i - n_first, M, N2, K,
                stride_xm, stride_xsm, stride_xsk, stride_wn2, stride_sn2, stride_wn2, stride_sn2, eps,
                BLOCK_N, PIECES, WIDTH, EVEN_K, GATE, layout,
            )  # fmt: skip
    else:
        _rows(
            p_x, p_x_descale, p_g, p_w, p_descale, p_w2, p_descale2, p_added, p_out, i, M, N, K,
            stride_xm, stride_xsm, stride_xsk, stride_wn, stride_sn, stride_wn2, stride_sn2, eps,
            BLOCK_N, PIECES, WIDTH, EVEN_K, GATE, layout,
        )  # fmt: skip
