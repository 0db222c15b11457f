"""The Hopper kernel on an FP8 cache: four more warps widen values to float16 between the fetching and the multiplying.

``_fetch``, ``_left`` and ``_right`` are those of the kernel for 16 bits, and the latter two see tiles of 16 bits. FP8
values are fetched into the first half of the very memory that their tile of 16 bits will fill. ``_widen`` reads them
and writes the tile over them, last columns first: so there are two stages in flight, as without it, and no memory
beside them.

Tiles are in float16 whatever the queries are in: it holds every FP8 value, two of them are converted by one
instruction, and P is eight times as exact in it. One factor a token multiplies scores and P in float32; of several the
largest does, and the tile holds values times what is left of theirs, a number up to HEADROOM. float16 has a narrow
range: queries in bfloat16 are shrunk for it, and P is held in units of the largest factor of its block.

Products in FP8 would need queries in FP8, and those alone cost 4e-2 of relative error on random data.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mlacompile.kernels.hopper import _wait_for_earlier
from mlacompile.kernels.mla_decode.hopper import _left
from mlacompile.kernels.mla_decode.hopper_fetch import _columns, _fetch, _scales_at
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item, _plan
from mlacompile.kernels.mla_decode.hopper_right import _right
from mlacompile.kernels.mla_decode.hopper_room import Parts, _barriers, _setup
from mlacompile.kernels.mla_decode.widen import _in_words, _rows_of_words, _twice

WIDEST = gl.constexpr(128)  # with 16 warps a thread has 128 registers, and a wgmma of 256 columns would need them all
GROUP = gl.constexpr(128)  # values of a latent that share a factor, where there is more than one


@gluon.jit
def _store_widened(tile, words, ratios, group: gl.constexpr, SCALED: gl.constexpr, CODE: gl.constexpr):
    """Store [64, W / 4] words of four FP8 values each as a [64, W] tile, times the ratios of their rows if SCALED.

    All of it moves as words: of single values each would take a register.
    """
    if SCALED:
        ratio = _twice(ratios.index(group).load(gl.SliceLayout(1, words.type.layout)))
        words, ratio = gl.broadcast(words, ratio[:, None])
        low, high = gl.inline_asm_elementwise(
            CODE, "=&r,=&r,r,r", [words, ratio], (gl.int32, gl.int32), is_pure=True, pack=1
        )
    else:
        low, high = gl.inline_asm_elementwise(CODE, "=&r,=&r,r", [words], (gl.int32, gl.int32), is_pure=True, pack=1)
    WIDTH: gl.constexpr = 2 * words.shape[1]
    layout: gl.constexpr = _in_words(tile.layout)
    tile._reinterpret(gl.int32, [BLOCK, WIDTH], layout).store(gl.reshape(gl.join(low, high), [BLOCK, WIDTH]))


@gluon.jit
def _keep(raw, factors, ratios, HEADROOM: gl.constexpr, SHRINK: gl.constexpr):
    """Store a block's factors, [64, G]: the one that ``_left`` multiplies with, and if G > 1 what is left of each."""
    if raw.shape[1] == 1:
        peak = gl.max(raw, 1)
        factors.store(peak * (1.0 / SHRINK))
    else:
        peak = gl.max(gl.abs(raw), 1)
        ratio = raw / gl.where(peak == 0, 1.0, peak)[:, None] * HEADROOM
        turned: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
        ratios._reinterpret(gl.float16, [BLOCK, raw.shape[1]], turned).store(ratio.to(gl.float16))
        factors.store(peak * (1.0 / (HEADROOM * SHRINK)))


@gluon.jit
def _widen(x, bar, arrived, factors, ratios, p_start, p_length, row, position, share, overhead, B, T,
           LEFT: gl.constexpr, QUARTER: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr, CODE: gl.constexpr,
           HEADROOM: gl.constexpr, SHRINK: gl.constexpr):  # fmt: skip
    """Widens each part of a stage when it has arrived.

    factors: [2, 64] of shared memory, for ``_left``. ratios: [G, 64], for use here.
    """
    W: gl.constexpr = QUARTER // 4
    layout: gl.constexpr = _rows_of_words(W)
    raw_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=QUARTER, element_bitwidth=32, rank=2)
    N_LEFT: gl.constexpr = LEFT // QUARTER
    left = x.left._reinterpret(gl.int32, [4 * N_LEFT, BLOCK, W], raw_layout)
    right = x.right._reinterpret(gl.int32, [8, BLOCK, W], raw_layout)
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    scale_layout: gl.constexpr = gl.BlockedLayout([1, G], [32, 1], [4, 1], [1, 0])
    scales = x.right._reinterpret(gl.float32, [2 * QUARTER // G, BLOCK, G], rows)
    g = 0
    todo = share
    while (row < B) & (todo > overhead):
        _lo, _hi, _end, _t, n, _skip, _rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        for i in range(g, g + n):
            stage = i & 1
            phase = (i >> 1) & 1
            mbarrier.wait(arrived.first.index(stage), phase)
            raw = scales.index(_scales_at(stage, QUARTER, G)).load(scale_layout)
            _keep(raw, factors.index(stage), ratios, HEADROOM, SHRINK)
            words = right.index(4 * stage).load(layout)
            _store_widened(x.right.index(2 * stage), words, ratios, _group(LEFT, GROUPS), G > 1, CODE)
            fence_async_shared()
            mbarrier.arrive(bar.first_full.index(stage), count=1)

            mbarrier.wait(arrived.left.index(stage), phase)
            tile = x.left.index(stage)
            for k in gl.static_range(N_LEFT):
                words = left.index(2 * N_LEFT * stage + N_LEFT - 1 - k).load(layout)
                part = tile.slice(LEFT - (k + 1) * QUARTER, QUARTER, dim=1)
                _store_widened(part, words, ratios, _group(LEFT - (k + 1) * QUARTER, GROUPS), G > 1, CODE)
            fence_async_shared()
            mbarrier.arrive(bar.left_full.index(stage), count=1)

            mbarrier.wait(arrived.last.index(stage), phase)
            words = right.index(4 * stage + 2).load(layout)
            _store_widened(x.right.index(2 * stage + 1), words, ratios, _group(LEFT + QUARTER, GROUPS), G > 1, CODE)
            fence_async_shared()
            mbarrier.arrive(bar.last_full.index(stage), count=1)
        g += n
        todo -= taken
        row += 1
        position = 0


@gluon.constexpr_function
def _group(column, groups):
    """Which factor a column has."""
    return min(column // GROUP, groups - 1)


@gluon.jit(do_not_specialize=["B", "T", "n_tiles", "n_pages", "n_columns", "stride_table", "min_share", "overhead"])
def _mla_decode_hopper_in_place_kernel(
    d_c, d_pe, d_scale, p_q, p_qpe, p_start, p_length, p_table, p_out, p_lse, p_part, p_part_lse, p_parts,
    scale_log2, B, H, S, T, n_tiles, apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, min_share,
    overhead, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
    R: gl.constexpr, P: gl.constexpr, LEFT: gl.constexpr, QUARTER: gl.constexpr, PANEL: gl.constexpr,
    BLOCK_P: gl.constexpr, PAGE: gl.constexpr, GROUPS: gl.constexpr, CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr,
    CHUNK: gl.constexpr, MANY: gl.constexpr, CODE: gl.constexpr, HEADROOM: gl.constexpr, SHRINK: gl.constexpr,
    RIGHT_REGS: gl.constexpr, WIDEN_REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As ``_mla_decode_hopper_kernel``. d_c: the cache as bytes, in boxes of QUARTER columns. d_scale: the factors, as
    [rows] or as [rows, GROUPS] in boxes of four columns. CODE: from WIDEN. SHRINK: what bfloat16 queries are
    multiplied with.
    """
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    factors = gl.allocate_shared_memory(gl.float32, [2, BLOCK], plain)
    G: gl.constexpr = _columns(d_scale.block_type.shape)
    ratios = factors
    if G > 1:
        ratios = gl.allocate_shared_memory(gl.float16, [G, BLOCK], plain)
    left_arrived = _barriers(2)
    arrived = Parts(_barriers(2), left_arrived, _barriers(2), left_arrived)
    x, bar = _setup(gl.float16, p_q.dtype.element_ty, LEFT, QUARTER, PANEL, BLOCK_P, False)
    i_tile = gl.program_id(0)
    part = gl.program_id(1)
    _wait_for_earlier()
    share, overhead, row, position = _plan(
        p_start, p_length, B, T, part, gl.num_programs(1), min_share, overhead, CHUNK, MANY
    )
    gl.warp_specialize(
        [
            (_left, (x, bar, p_q, p_start, p_length, p_out, p_lse, p_part, p_part_lse, p_parts, part, row, position,
                     share, overhead, B, i_tile, n_tiles, scale_log2, H, S, T, stride_qb, stride_qh, stride_qs,
                     stride_qr, R, LEFT, QUARTER, PANEL, BLOCK_P, CAUSAL, ONE_QUERY, WIDEST, factors, True, SHRINK,
                     False)),
            (_right, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                      i_tile, n_tiles, H, S, T, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph,
                      stride_ps, stride_pr, R, P, LEFT, QUARTER, PANEL, BLOCK_P, ONE_QUERY, SHRINK, True)),
            (_widen, (x, bar, arrived, factors, ratios, p_start, p_length, row, position, share, overhead, B, T, LEFT,
                      QUARTER, GROUPS, G, CODE, HEADROOM, SHRINK)),
            (_fetch, (x, bar, arrived, d_c, d_pe, d_scale, p_start, p_length, p_table, row, position, share, overhead,
                      B, T, apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, LEFT, QUARTER, BLOCK_P,
                      PAGE, False)),
        ],
        [4, 4, 1],
        [RIGHT_REGS, WIDEN_REGS, 32],
    )  # fmt: skip
