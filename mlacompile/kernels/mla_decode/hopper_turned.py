"""The Hopper kernel with FP8 products: an e4m3 cache is never widened in shared memory.

Shared memory, not the tensor cores, bounds the kernels that widen: each value is read, written twice as wide, and read
twice as wide by either product. Here keys are multiplied as the FP8 values that they are, and values on their way
through registers:

    _fetch    one warp: cache rows into STAGES stages
    _scores   four warps: all scores, the softmax, P
    _values   eight warps: the output, turned: O^T = V^T * P^T, sums of pairs of columns by rows

More than 32 rows are cut into tiles of 32, which begin and end soon, where there are few blocks for each program, and
into tiles of 64 where there are many. With 64 rows scores take longer than all else: two groups of four warps take
blocks by turns, and each fetches its own (``hopper_turned_by_turns.py``). Where a program has many blocks of long rows,
or a token several factors, keys are their left operand (``hopper_turned_by_tokens.py``).

A query is the sum of two FP8 values, its rounding and what that leaves: with eight bits of mantissa as good as bf16.
Both are multiplied with the same keys and add to one sum; up to 32 rows are STACKED, both parts in one tile, at the
price of one, and held in registers. Rows are scaled by powers of two into the range of FP8, the rotary part with
them, which is exact, and scores are scaled back where they become exponents.

A transposing load of 16-bit words brings pairs of neighbouring columns into the fragments of a left operand. Split
into even and odd columns and converted to float16, which holds every e4m3 value, they are left operands of two products
whose right operand, P^T, has as few columns as there are rows (query, head). P holds the factors of the tokens and is
kept in the range of float16 by counting the largest factor of a block among the scores. With more than 32 rows, values
of long contexts are not even converted: P is then e4m3 as well (``hopper_turned_wide.py``).

With several factors a token, one for each group of 128 columns, each group has scores and a P of its own in tiles of 32
(``hopper_turned_groups.py``), and ``_values`` are two partitions of four warps, because eight would share one P. In
tiles of 64 scores of groups are added up as they come, and values are multiplied instead of P
(``hopper_turned_shares.py``).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# No "from __future__ import annotations": the fields of an aggregate are types, not strings.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlacompile.kernels.hopper import _wait_for_earlier
from mlacompile.kernels.mla_decode.hopper_plan import _plan
from mlacompile.kernels.mla_decode.hopper_turned_by_tokens import _scores_by_tokens
from mlacompile.kernels.mla_decode.hopper_turned_by_turns import _scores_by_turns
from mlacompile.kernels.mla_decode.hopper_turned_fetch import _fetch_stages
from mlacompile.kernels.mla_decode.hopper_turned_groups import _scores_of_groups
from mlacompile.kernels.mla_decode.hopper_turned_room import _is_weighed, _turned_setup
from mlacompile.kernels.mla_decode.hopper_turned_scores import _scores
from mlacompile.kernels.mla_decode.hopper_turned_values import _values


@gluon.jit(do_not_specialize=[
    "B", "T", "n_tiles", "n_pages", "n_columns", "stride_table", "min_share", "overhead", "coarse_from",
])  # fmt: skip
def _mla_decode_hopper_turned_kernel(
    d_c, d_pe, d_scale, p_q, p_qpe, p_start, p_length, p_table, p_out, p_lse, p_part, p_part_lse, p_parts,
    scale_log2, B, H, S, T, n_tiles, apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, min_share,
    overhead, coarse_from, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb, stride_ph, stride_ps, stride_pr,
    R: gl.constexpr, P: gl.constexpr, WIDTH: gl.constexpr, BLOCK_P: gl.constexpr, COLS: gl.constexpr,
    STACKED: gl.constexpr, APART: gl.constexpr, GROUPS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, ONE_QUERY: gl.constexpr, CHUNK: gl.constexpr, MANY: gl.constexpr, CODE: gl.constexpr,
    VALUE_REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As ``_mla_decode_hopper_kernel``. d_c: the cache as e4m3, in boxes of 128 columns. d_scale: the factors, as
    [rows] or as [rows, GROUPS] in boxes of four columns.

    p_out and p_part point to words of two values. COLS: rows of a tile that there can be, 16, 32 or 64.
    STACKED: both parts of the queries are rows of one tile; there are 32 rows at most. If not, P of batch rows that
    see coarse_from tokens or more is e4m3. APART: both parts have scores of their own.
    """
    x, bar = _turned_setup(p_q.dtype.element_ty, STACKED, APART, WIDTH, BLOCK_P, STAGES, GROUPS)
    i_tile = gl.program_id(0)
    part = gl.program_id(1)
    _wait_for_earlier()
    share, overhead, row, position = _plan(
        p_start, p_length, B, T, part, gl.num_programs(1), min_share, overhead, CHUNK, MANY, coarse_from,
        _is_weighed(GROUPS, STACKED),
    )  # fmt: skip
    cache = (d_c, d_pe, d_scale, apart_c, apart_pe, apart_scale, p_table, stride_table, n_pages, n_columns)
    if GROUPS > 1 and STACKED:
        gl.warp_specialize([
            (_scores_of_groups, (x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share,
                                 overhead, B, i_tile, n_tiles, scale_log2, H, S, T, GROUPS, BLOCK_P, STAGES, CAUSAL,
                                 ONE_QUERY)),
            (_values, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                       i_tile, n_tiles, H, S, T, coarse_from, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb,
                       stride_ph, stride_ps, stride_pr, R, P, STACKED, WIDTH, BLOCK_P, COLS, STAGES, CODE,
                       ONE_QUERY, GROUPS, 0)),
            (_values, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                       i_tile, n_tiles, H, S, T, coarse_from, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb,
                       stride_ph, stride_ps, stride_pr, R, P, STACKED, WIDTH, BLOCK_P, COLS, STAGES, CODE,
                       ONE_QUERY, GROUPS, 1)),
            (_fetch_stages, (x, bar, cache, p_start, p_length, row, position, share, overhead, B, T, WIDTH, BLOCK_P,
                             PAGE, STAGES)),
        ], [4, 4, 1], [VALUE_REGS, VALUE_REGS, 24])  # fmt: skip
    elif not STACKED:
        gl.warp_specialize([
            (_scores_by_tokens if APART else _scores_by_turns,
             (x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B, i_tile,
              n_tiles, scale_log2, H, S, T, coarse_from, cache, WIDTH, BLOCK_P, PAGE, STAGES, CAUSAL, ONE_QUERY, GROUPS,
              0)),
            (_scores_by_tokens if APART else _scores_by_turns,
             (x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B, i_tile,
              n_tiles, scale_log2, H, S, T, coarse_from, cache, WIDTH, BLOCK_P, PAGE, STAGES, CAUSAL, ONE_QUERY, GROUPS,
              1)),
            (_values, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                       i_tile, n_tiles, H, S, T, coarse_from, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb,
                       stride_ph, stride_ps, stride_pr, R, P, STACKED, WIDTH, BLOCK_P, COLS, STAGES, CODE,
                       ONE_QUERY, GROUPS, 0)),
        ], [4, 8], [256 - VALUE_REGS, VALUE_REGS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_scores, (x, bar, p_start, p_length, p_lse, p_part_lse, p_parts, part, row, position, share, overhead, B,
                       i_tile, n_tiles, scale_log2, H, S, T, BLOCK_P, STAGES, CAUSAL, ONE_QUERY)),
            (_values, (x, bar, p_q, p_qpe, p_start, p_length, p_out, p_part, part, row, position, share, overhead, B,
                       i_tile, n_tiles, H, S, T, coarse_from, stride_qb, stride_qh, stride_qs, stride_qr, stride_pb,
                       stride_ph, stride_ps, stride_pr, R, P, STACKED, WIDTH, BLOCK_P, COLS, STAGES, CODE,
                       ONE_QUERY, GROUPS, 0)),
            (_fetch_stages, (x, bar, cache, p_start, p_length, row, position, share, overhead, B, T, WIDTH, BLOCK_P,
                             PAGE, STAGES)),
        ], [8, 1], [VALUE_REGS, 24])  # fmt: skip
