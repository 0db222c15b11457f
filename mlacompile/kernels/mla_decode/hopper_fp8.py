"""The Hopper kernel on an FP8 cache: the fetching warp gives way to four that widen values to 16 bits on their way in.

``_left`` and ``_right`` are those of ``hopper.py``, and see tiles of 16 bits. ``_widen`` loads a block of 64 tokens
ahead, 8 values a thread and load, multiplies it with its factors (one a token, or one for every 128 values of a latent)
and stores it where TMA would have put it. A block is in flight for as long as the one before it is computed, which
hides the latency of memory; and addresses are free, so a cache may lie in runs of 656 bytes or in several arrays.

e4m3 and bfloat16 both are sign, exponent, mantissa: shifted into place a value lacks only a factor of 2^120 (2^112 for
e5m2), subnormal or not. NaN does not survive this; a quantizer that meets one gives NaN as the factor.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mlacompile.kernels.mla_decode.hopper import BLOCK, _begin, _item, _left, _plan, _right, _setup, _unit

GROUP = gl.constexpr(128)  # values of a latent that share a factor, where there is more than one


def _shifted(shift: int, power: int) -> str:
    """PTX: four FP8 values $2 times a factor, twice in $3, to two pairs of bfloat16 $0 and $1."""
    kept = 0x7F007F00 >> shift
    lines = [".reg .b32 x, y, f;", f"mov.b32 f, 0x{power:04x}{power:04x};"]
    for i, bytes_apart in enumerate(("0x1404", "0x3424")):
        lines += [
            f"prmt.b32 x, $2, 0, {bytes_apart};",
            f"shr.u32 y, x, {shift};",
            f"and.b32 y, y, 0x{kept:08x};",
            "and.b32 x, x, 0x80008000;",
            "or.b32 x, x, y;",
            "mul.bf16x2 x, x, f;",
            f"mul.bf16x2 ${i}, x, $3;",
        ]
    return "{ " + " ".join(lines) + " }"


def _converted(name: str) -> str:
    """The same to float16, for which there is an instruction."""
    return (
        "{ .reg .b16 a, b; .reg .b32 x, y; mov.b32 {a, b}, $2; "
        f"cvt.rn.f16x2.{name}x2 x, a; cvt.rn.f16x2.{name}x2 y, b; "
        "mul.f16x2 $0, x, $3; mul.f16x2 $1, y, $3; }"
    )


#: PTX by what the cache holds and what the products take, and PTX that makes a factor of 32 bits two of 16.
WIDEN = {
    (torch.float8_e4m3fn, torch.bfloat16): _shifted(4, 0x7B80),
    (torch.float8_e5m2, torch.bfloat16): _shifted(3, 0x7780),
    (torch.float8_e4m3fn, torch.float16): _converted("e4m3"),
    (torch.float8_e5m2, torch.float16): _converted("e5m2"),
}
TWICE = {
    torch.bfloat16: "cvt.rn.bf16x2.f32 $0, $1, $1;",
    torch.float16: "cvt.rn.f16x2.f32 $0, $1, $1;",
}


@gluon.jit
def _store_widened(tile, words, factor, CODE: gl.constexpr):
    """Store [64, W / 4] words of four FP8 values each, times the factor of their row, as a [64, W] tile of 16 bits.

    All of it moves as words of 32 bits: single values that live from one block to the next would take a register each.
    """
    both = gl.broadcast(factor, words)
    pairs = gl.inline_asm_elementwise(CODE, "=r,=r,r,r", [words, both[0]], (gl.int32, gl.int32), is_pure=True, pack=1)
    _store_words(tile, gl.reshape(gl.join(pairs[0], pairs[1]), [BLOCK, 2 * words.shape[1]]))


@gluon.jit
def _store_words(tile, words):
    """Store pairs of 16-bit values, as words."""
    WIDTH: gl.constexpr = words.shape[1]
    layout: gl.constexpr = _in_words(tile.layout)
    tile._reinterpret(gl.int32, [BLOCK, WIDTH], layout).store(words)


@gluon.constexpr_function
def _in_words(layout):
    return gl.NVMMASharedLayout(swizzle_byte_width=layout.swizzle_byte_width, element_bitwidth=32, rank=2)


@gluon.constexpr_function
def _word_layout(words):
    """Rows of words, two words a thread."""
    across = min(words // 2, 32)
    return gl.BlockedLayout([1, 2], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def _tokens(t, T, PAGE: gl.constexpr, layout: gl.constexpr):
    """Tokens of a block counted from its unit, which is the batch row or the page; none beyond the cache."""
    o_t = t + gl.arange(0, BLOCK, layout)
    if PAGE == 0:
        return gl.minimum(o_t, T - 1)
    else:
        return o_t & (PAGE - 1)


@gluon.jit
def _words(p, o_token, COLUMN: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    """Words [COLUMN, COLUMN + WIDTH) of each token of a block; zeros beyond word D."""
    o_c = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    p_v = p + o_token[:, None] + o_c[None, :]
    if COLUMN + WIDTH <= D:
        return gl.load(p_v)
    else:
        return gl.load(p_v, mask=(o_c < D)[None, :], other=0)


@gluon.jit
def _factors(p, o_token, COLUMN: gl.constexpr, GROUPS: gl.constexpr, CODE: gl.constexpr):
    """The factor of each token of a block for the values around COLUMN, twice in 16 bits."""
    group: gl.constexpr = 0 if GROUPS == 1 else min(COLUMN // GROUP, GROUPS - 1)
    return gl.inline_asm_elementwise(CODE, "=r,r", [gl.load(p + o_token + group)], gl.int32, is_pure=True, pack=1)[
        :, None
    ]


@gluon.jit
def _widen(x, bar, p_c, p_pe, p_scale, p_start, p_length, p_table, row, position, share, overhead, B, T, stride_cb,
           stride_ct, stride_kb, stride_kt, stride_fb, stride_ft, n_pages, stride_table, n_columns,
           R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, BLOCK_P: gl.constexpr,
           PAGE: gl.constexpr, GROUPS: gl.constexpr, CODE: gl.constexpr, TWICE: gl.constexpr):  # fmt: skip
    """Fills the two stages, part by part, as soon as each part has been used for the last time.

    Each part is loaded one block before it is stored, so that it has that long to arrive.
    """
    layout: gl.constexpr = _word_layout(QUARTER // 4)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    pe_layout: gl.constexpr = _word_layout(BLOCK_P // 2 if BLOCK_P > 0 else 8)
    by_pe_row: gl.constexpr = gl.SliceLayout(1, pe_layout)
    o_left = gl.arange(0, LEFT // 4, gl.SliceLayout(0, layout))
    g = 0
    todo = share
    while (row < B) & (todo > overhead):
        _lo, _hi, _end, t, n, _skip, _rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        p_pages = p_table
        if PAGE > 0:
            p_pages += row.to(gl.int64) * stride_table
        unit = _unit(p_pages, row, t, n_pages, n_columns, PAGE).to(gl.int64)
        o_t = _tokens(t, T, PAGE, by_row)
        p_block = p_c + unit * stride_cb
        p_factor = p_scale + unit * stride_fb
        first = _words(p_block, o_t * stride_ct, LEFT // 4, QUARTER // 4, R // 4, layout)
        left = _words(p_block, o_t * stride_ct, 0, LEFT // 4, R // 4, layout)
        last = _words(p_block, o_t * stride_ct, (LEFT + QUARTER) // 4, QUARTER // 4, R // 4, layout)
        f_first = _factors(p_factor, o_t * stride_ft, LEFT, GROUPS, TWICE)
        f_left = f_first
        f_more = f_first
        f_last = f_first
        if GROUPS > 1:
            f_left = _factors(p_factor, o_t * stride_ft, 0, GROUPS, TWICE)
            f_more = _factors(p_factor, o_t * stride_ft, GROUP, GROUPS, TWICE)
            f_last = _factors(p_factor, o_t * stride_ft, LEFT + QUARTER, GROUPS, TWICE)
        pe = gl.full((BLOCK, 1), 0, gl.int32, pe_layout)
        if BLOCK_P > 0:
            o_pe = _tokens(t, T, PAGE, by_pe_row) * stride_kt
            pe = _words(p_pe + unit * stride_kb, o_pe, 0, BLOCK_P // 2, P // 2, pe_layout)
        t_last = t + (n - 1) * BLOCK
        t = gl.minimum(t + BLOCK, t_last)
        ahead = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        for i in range(g, g + n):
            stage = i & 1
            free = ((i >> 1) & 1) ^ 1
            unit = ahead.to(gl.int64)
            o_t = _tokens(t, T, PAGE, by_row)
            p_block = p_c + unit * stride_cb
            p_factor = p_scale + unit * stride_fb

            mbarrier.wait(bar.first_empty.index(stage), free)
            _store_widened(x.right.index(2 * stage), first, f_first, CODE)
            if BLOCK_P > 0:
                _store_words(x.pe.index(stage), pe)
            fence_async_shared()
            mbarrier.arrive(bar.first_full.index(stage), count=1)
            first = _words(p_block, o_t * stride_ct, LEFT // 4, QUARTER // 4, R // 4, layout)
            f_next = _factors(p_factor, o_t * stride_ft, LEFT, GROUPS, TWICE)
            if BLOCK_P > 0:
                o_pe = _tokens(t, T, PAGE, by_pe_row) * stride_kt
                pe = _words(p_pe + unit * stride_kb, o_pe, 0, BLOCK_P // 2, P // 2, pe_layout)

            mbarrier.wait(bar.left_empty.index(stage), free)
            if GROUPS == 1:
                _store_widened(x.left.index(stage), left, f_first, CODE)
            elif LEFT > GROUP:
                f_both = gl.where((4 * o_left < GROUP)[None, :], f_left, f_more)
                _store_widened(x.left.index(stage), left, f_both, CODE)
            else:
                _store_widened(x.left.index(stage), left, f_left, CODE)
            fence_async_shared()
            mbarrier.arrive(bar.left_full.index(stage), count=1)
            left = _words(p_block, o_t * stride_ct, 0, LEFT // 4, R // 4, layout)
            if GROUPS > 1:
                f_left = _factors(p_factor, o_t * stride_ft, 0, GROUPS, TWICE)
                f_more = _factors(p_factor, o_t * stride_ft, GROUP, GROUPS, TWICE)

            mbarrier.wait(bar.last_empty.index(stage), free)
            if GROUPS == 1:
                _store_widened(x.right.index(2 * stage + 1), last, f_first, CODE)
            else:
                _store_widened(x.right.index(2 * stage + 1), last, f_last, CODE)
                f_last = _factors(p_factor, o_t * stride_ft, LEFT + QUARTER, GROUPS, TWICE)
            fence_async_shared()
            mbarrier.arrive(bar.last_full.index(stage), count=1)
            last = _words(p_block, o_t * stride_ct, (LEFT + QUARTER) // 4, QUARTER // 4, R // 4, layout)
            f_first = f_next
            t = gl.minimum(t + BLOCK, t_last)
            ahead = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        g += n
        todo -= taken
        row += 1
        position = 0


@gluon.jit(do_not_specialize=["B", "T", "n_tiles", "n_pages", "n_columns", "stride_table", "min_share"])
def _mla_decode_hopper_fp8_kernel(
    p_c, p_pe, p_scale, p_q, p_qpe, p_start, p_length, p_table, p_out, p_lse, p_part, p_part_lse, p_parts,
    scale_log2, B, H, S, T, n_tiles, n_pages, stride_table, n_columns, min_share,
    stride_cb, stride_ct, stride_kb, stride_kt, stride_fb, stride_ft,
    stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
    R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr,
    BLOCK_P: gl.constexpr, PAGE: gl.constexpr, GROUPS: gl.constexpr, CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr,
    CODE: gl.constexpr, TWICE: gl.constexpr, RIGHT_REGS: gl.constexpr, WIDEN_REGS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """As ``_mla_decode_hopper_kernel``. stride_cb, kb, fb: from one batch row or page to the next; ct, kt, ft: a token.

    p_c and p_pe point to words of 32 bits, which strides and offsets of the cache count. GROUPS: factors a token.
    CODE, TWICE: from WIDEN and TWICE.
    """
    _begin()
    i_tile = gl.program_id(0)
    part = gl.program_id(1)
    share, overhead, row, position = _plan(p_start, p_length, B, T, part, gl.num_programs(1), min_share)
    x, bar = _setup(p_q.dtype.element_ty, LEFT, QUARTER, PANEL, BLOCK_P)
    gl.warp_specialize(
        [
            (_left, (x, bar, p_q, p_start, p_length, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, position,
                     share, overhead, B, i_tile, n_tiles, scale_log2, H, S, T, stride_qb, stride_qh, stride_qs,
                     stride_qr, R, LEFT, QUARTER, PANEL, BLOCK_P, CAUSAL, ONE_QUERY)),
            (_right, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                      i_tile, n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
                      stride_ps, stride_pr, R, P, LEFT, QUARTER, PANEL, BLOCK_P, ONE_QUERY)),
            (_widen, (x, bar, p_c, p_pe, p_scale, p_start, p_length, p_table, row, position, share, overhead, B, T,
                      stride_cb, stride_ct, stride_kb, stride_kt, stride_fb, stride_ft, n_pages, stride_table,
                      n_columns, R, P, LEFT, QUARTER, BLOCK_P, PAGE, GROUPS, CODE, TWICE)),
        ],
        [4, 4],
        [RIGHT_REGS, WIDEN_REGS],
    )  # fmt: skip
