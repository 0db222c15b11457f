"""The Hopper kernel on an FP8 cache: the fetching warp gives way to four that widen values to 16 bits on their way in.

``_left`` and ``_right`` are those of ``hopper.py``, and see tiles of 16 bits. ``_widen`` loads a block of 64 tokens
ahead, multiplies each value with its factor (one a token, or one for every 128 values of a latent), rounds the product
to 16 bits and stores it where TMA would have put it. A block is in flight for as long as the one before it is computed,
and addresses are free, so a cache may lie in runs of 656 bytes or in several arrays. Much of that time is lost again:
ptxas gives all loads in flight one scoreboard, so whatever waits for one waits for all. ``hopper_in_place.py`` is to
take this file's place when it has run on a GPU.

Products in FP8 would need queries in FP8, and those alone cost 4e-2 of relative error on random data; so only the cache
is small, and what it says is rounded once, as a cache of 16 bits would have been.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mlacompile.kernels.mla_decode.hopper import _left, _right
from mlacompile.kernels.mla_decode.hopper_fetch import _unit
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item, _plan
from mlacompile.kernels.mla_decode.hopper_room import _begin, _setup
from mlacompile.kernels.mla_decode.hopper_rows import _here
from mlacompile.kernels.mla_decode.widen import _in_words, _rows_of_words

GROUP = gl.constexpr(128)  # values of a latent that share a factor, where there is more than one


@gluon.jit
def _store_words(tile, words):
    """Store pairs of 16-bit values, as words, into a tile of 16-bit values."""
    WIDTH: gl.constexpr = words.shape[1]
    layout: gl.constexpr = _in_words(tile.layout)
    tile._reinterpret(gl.int32, [BLOCK, WIDTH], layout).store(words)


@gluon.jit
def _store_widened(tile, words, factor, CODE: gl.constexpr):
    """Store [64, W / 4] words of four FP8 values each, times the factor of their row, as a [64, W] tile.

    All of it moves as words: single values that live from one block to the next would take a register each.
    """
    words, factor = gl.broadcast(words, factor[:, None])
    low, high = gl.inline_asm_elementwise(
        CODE, "=r,=r,r,f", [words, factor], (gl.int32, gl.int32), is_pure=True, pack=1
    )
    _store_words(tile, gl.reshape(gl.join(low, high), [BLOCK, 2 * words.shape[1]]))


@gluon.jit
def _tokens(t, T, PAGE: gl.constexpr, layout: gl.constexpr):
    """Tokens of a block counted from its unit, which is the batch row or the page; none beyond the cache."""
    o_t = t + gl.arange(0, BLOCK, layout)
    if PAGE == 0:
        return gl.minimum(o_t, T - 1)
    else:
        return o_t & (PAGE - 1)


@gluon.jit
def _offsets(t, T, apart, PAGE: gl.constexpr, layout: gl.constexpr):
    """Where each token of a block begins in its unit."""
    return _tokens(t, T, PAGE, layout) * _here(apart)


@gluon.jit
def _words(p, o_pair, more, COLUMN: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    """Words [COLUMN, COLUMN + WIDTH) of each token of a block, if there is more; zeros beyond word D.

    o_pair: where each token begins, in pairs of words, so that the compiler knows it may load two at once.
    """
    o_c = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    mask = gl.full([BLOCK, WIDTH], more, gl.int1, layout)
    if COLUMN + WIDTH > D:
        mask = mask & (o_c < D)[None, :]
    return gl.load(p + (2 * o_pair)[:, None] + o_c[None, :], mask=mask, other=0)


@gluon.jit
def _scales(p, o_token, more, GROUPS: gl.constexpr, G: gl.constexpr, layout: gl.constexpr):
    """The factors of a block, [G, 64]."""
    o_g = gl.arange(0, G, gl.SliceLayout(1, layout))
    mask = gl.full([G, BLOCK], more, gl.int1, layout) & (o_g < GROUPS)[:, None]
    return gl.load(p + o_token[None, :] + o_g[:, None], mask=mask, other=0.0)


@gluon.jit
def _widen(x, factors, bar, p_c, p_pe, p_scale, p_start, p_length, p_table, row, position, share, overhead, B, T,
           pair_cb, pair_ct, pair_kb, pair_kt, stride_fb, stride_ft, n_pages, stride_table, n_columns,
           R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, BLOCK_P: gl.constexpr,
           PAGE: gl.constexpr, GROUPS: gl.constexpr, CODE: gl.constexpr):  # fmt: skip
    """Fills the two stages, part by part, as soon as each part has been used for the last time.

    Each part is loaded one block before it is stored, so that it has that long to arrive. factors: [G, 64] of shared
    memory, in which a block's factors change places: one thread loads one, sixteen need it.
    """
    W: gl.constexpr = QUARTER // 4
    W_P: gl.constexpr = BLOCK_P // 2 if BLOCK_P > 0 else 8
    layout: gl.constexpr = _rows_of_words(W)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    pe_layout: gl.constexpr = _rows_of_words(W_P)
    by_pe_row: gl.constexpr = gl.SliceLayout(1, pe_layout)
    G: gl.constexpr = factors.shape[0]
    scale_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [2 if G > 1 else 1, 2 if G > 1 else 4], [1, 0])
    by_token: gl.constexpr = gl.SliceLayout(0, scale_layout)
    W_HALF: gl.constexpr = LEFT // 8
    half_layout: gl.constexpr = _rows_of_words(W_HALF)
    by_half_row: gl.constexpr = gl.SliceLayout(1, half_layout)
    G_FIRST: gl.constexpr = 0 if GROUPS == 1 else min(LEFT // GROUP, GROUPS - 1)
    G_LAST: gl.constexpr = 0 if GROUPS == 1 else min((LEFT + QUARTER) // GROUP, GROUPS - 1)
    G_MORE: gl.constexpr = 0 if GROUPS == 1 else min((LEFT // 2) // GROUP, GROUPS - 1)
    square = factors._reinterpret(gl.float32, [G, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    g = 0
    todo = share
    while (row < B) & (todo > overhead):
        _lo, _hi, _end, t, n, _skip, _rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        p_pages = p_table
        if PAGE > 0:
            p_pages += row.to(gl.int64) * stride_table
        unit = _unit(p_pages, row, t, n_pages, n_columns, PAGE).to(gl.int64)
        p_block = p_c + 2 * (unit * pair_cb)
        o_t = _offsets(t, T, pair_ct, PAGE, by_row)
        first = _words(p_block, o_t, True, LEFT // 4, W, R // 4, layout)
        o_half = _offsets(t, T, pair_ct, PAGE, by_half_row)
        left0 = _words(p_block, o_half, True, 0, W_HALF, R // 4, half_layout)
        left1 = _words(p_block, o_half, True, W_HALF, W_HALF, R // 4, half_layout)
        o_f = _offsets(t, T, stride_ft, PAGE, by_token)
        scales = _scales(p_scale + unit * stride_fb, o_f, True, GROUPS, G, scale_layout)
        pe = gl.full((BLOCK, 1), 0, gl.int32, pe_layout)
        if BLOCK_P > 0:
            o_pe = _offsets(t, T, pair_kt, PAGE, by_pe_row)
            pe = _words(p_pe + 2 * (unit * pair_kb), o_pe, True, 0, W_P, P // 2, pe_layout)
        t += BLOCK
        ahead = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        for i in range(g, g + n):
            stage = i & 1
            free = ((i >> 1) & 1) ^ 1
            more = i + 1 < g + n
            o_t = _offsets(t - BLOCK, T, pair_ct, PAGE, by_row)
            last = _words(p_block, o_t, True, (LEFT + QUARTER) // 4, W, R // 4, layout)
            unit = ahead.to(gl.int64)
            p_block = p_c + 2 * (unit * pair_cb)
            square.store(scales)
            o_f = _offsets(t, T, stride_ft, PAGE, by_token)
            scales = _scales(p_scale + unit * stride_fb, o_f, more, GROUPS, G, scale_layout)

            mbarrier.wait(bar.first_empty.index(stage), free)
            _store_widened(x.right.index(2 * stage), first, factors.index(G_FIRST).load(by_row), CODE)
            if BLOCK_P > 0:
                _store_words(x.pe.index(stage), pe)
            fence_async_shared()
            mbarrier.arrive(bar.first_full.index(stage), count=1)

            mbarrier.wait(bar.left_empty.index(stage), free)
            halves = x.left.index(stage)
            _store_widened(halves.slice(0, LEFT // 2, dim=1), left0, factors.index(0).load(by_half_row), CODE)
            o_t = _offsets(t, T, pair_ct, PAGE, by_row)
            first = _words(p_block, o_t, more, LEFT // 4, W, R // 4, layout)
            if BLOCK_P > 0:
                o_pe = _offsets(t, T, pair_kt, PAGE, by_pe_row)
                pe = _words(p_pe + 2 * (unit * pair_kb), o_pe, more, 0, W_P, P // 2, pe_layout)
            _store_widened(
                halves.slice(LEFT // 2, LEFT // 2, dim=1), left1, factors.index(G_MORE).load(by_half_row), CODE
            )
            fence_async_shared()
            mbarrier.arrive(bar.left_full.index(stage), count=1)
            o_half = _offsets(t, T, pair_ct, PAGE, by_half_row)
            left0 = _words(p_block, o_half, more, 0, W_HALF, R // 4, half_layout)

            mbarrier.wait(bar.last_empty.index(stage), free)
            _store_widened(x.right.index(2 * stage + 1), last, factors.index(G_LAST).load(by_row), CODE)
            fence_async_shared()
            mbarrier.arrive(bar.last_full.index(stage), count=1)
            left1 = _words(p_block, o_half, more, W_HALF, W_HALF, R // 4, half_layout)
            t += BLOCK
            ahead = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        g += n
        todo -= taken
        row += 1
        position = 0


@gluon.jit(do_not_specialize=["B", "T", "n_tiles", "n_pages", "n_columns", "stride_table", "min_share", "overhead"])
def _mla_decode_hopper_fp8_kernel(
    p_c, p_pe, p_scale, p_q, p_qpe, p_start, p_length, p_table, p_out, p_lse, p_part, p_part_lse, p_parts,
    scale_log2, B, H, S, T, n_tiles, n_pages, stride_table, n_columns, min_share, overhead,
    pair_cb, pair_ct, pair_kb, pair_kt, stride_fb, stride_ft,
    stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
    R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr,
    BLOCK_P: gl.constexpr, PAGE: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr, CAUSAL: gl.constexpr,
    ONE_QUERY: gl.constexpr, CHUNK: gl.constexpr, MANY: gl.constexpr, CODE: gl.constexpr, RIGHT_REGS: gl.constexpr,
    WIDEN_REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As ``_mla_decode_hopper_kernel``. cb, kb, fb: from one batch row or page to the next; ct, kt, ft: a token.

    p_c and p_pe point to words of 32 bits, and "pair" counts two of them. GROUPS: factors a token, G: as a power of
    two. CODE: from WIDEN.
    """
    _begin()
    i_tile = gl.program_id(0)
    part = gl.program_id(1)
    share, overhead, row, position = _plan(
        p_start, p_length, B, T, part, gl.num_programs(1), min_share, overhead, CHUNK, MANY
    )
    x, bar = _setup(p_q.dtype.element_ty, LEFT, QUARTER, PANEL, BLOCK_P)
    factors = gl.allocate_shared_memory(gl.float32, [G, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize(
        [
            (_left, (x, bar, p_q, p_start, p_length, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, position,
                     share, overhead, B, i_tile, n_tiles, scale_log2, H, S, T, stride_qb, stride_qh, stride_qs,
                     stride_qr, R, LEFT, QUARTER, PANEL, BLOCK_P, CAUSAL, ONE_QUERY, LEFT, x.alpha, False)),
            (_right, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                      i_tile, n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
                      stride_ps, stride_pr, R, P, LEFT, QUARTER, PANEL, BLOCK_P, ONE_QUERY)),
            (_widen, (x, factors, bar, p_c, p_pe, p_scale, p_start, p_length, p_table, row, position, share, overhead,
                      B, T, pair_cb, pair_ct, pair_kb, pair_kt, stride_fb, stride_ft, n_pages, stride_table, n_columns,
                      R, P, LEFT, QUARTER, BLOCK_P, PAGE, GROUPS, CODE)),
        ],
        [4, 4],
        [RIGHT_REGS, WIDEN_REGS],
    )  # fmt: skip
