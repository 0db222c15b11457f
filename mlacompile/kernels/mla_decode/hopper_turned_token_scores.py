"""Scores of ``hopper_turned_by_tokens.py``: keys on the left, both parts of the queries side by side on the right.

With one factor a token all columns are one sum in float16. With several each group of columns is one, and is added to
those before times what its factor has of the token's largest, which is 1 at most: so neither overflows.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from mlacompile.kernels.hopper import _here
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK
from mlacompile.kernels.mla_decode.hopper_room import ROWS
from mlacompile.kernels.mla_decode.hopper_turned_moved import _halves
from mlacompile.kernels.mla_decode.hopper_turned_room import FACTORS, GROUP, PLACES
from mlacompile.kernels.mla_decode.hopper_turned_rows import REST
from mlacompile.kernels.mla_decode.hopper_turned_shares import LARGEST_SHARE
from mlacompile.kernels.mla_decode.hopper_turned_token_rows import _by_tokens

# Scores of either part of two queries, times the power of two of each, to float32. As one instruction: the compiler
# must not look at sums before they are waited for.
SUM_OF_PARTS = gl.constexpr(
    f"{{ .reg .b32 x, rest; .reg .b16 a, b; mov.b32 rest, 0x{(15 - REST << 10) * 0x10001:x}; "
    "fma.rn.f16x2 x, $3, rest, $2; mul.rn.f16x2 x, x, $4; "
    "mov.b32 {a, b}, x; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
)
# The same of one group of columns, added up with what its factor has of the token's largest; and the sum to float32.
SUM_OF_GROUP = gl.constexpr(
    f"{{ .reg .b32 x, rest; mov.b32 rest, 0x{(15 - REST << 10) * 0x10001:x}; "
    "fma.rn.f16x2 x, $2, rest, $1; fma.rn.f16x2 $0, x, $3, $4; }"
)
SUM_OF_GROUPS = gl.constexpr(
    "{ .reg .b32 x; .reg .b16 a, b; mul.rn.f16x2 x, $2, $3; mov.b32 {a, b}, x; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
)


@gluon.constexpr_function
def _both_parts():
    """The layout of a product of keys and both parts of the queries."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * ROWS, 32])


@gluon.jit
def _queries_of_tile(x, stage):
    """Both parts of the queries: the only tile, which the compiler must not know, or it would keep addresses."""
    return x.q.index(_here(stage) >> 8)


@gluon.jit
def _begin_columns(keys, queries, s, FIRST: gl.constexpr, SOME: gl.constexpr):
    """Begins to add the products of some columns."""
    right = queries.slice(FIRST, SOME, dim=1).permute((1, 0))
    return warpgroup_mma(keys.slice(FIRST, SOME, dim=1), right, s, use_acc=FIRST > 0, is_async=True)


@gluon.jit
def _end_columns(keys, queries, s, FIRST: gl.constexpr, SOME: gl.constexpr, ADD: gl.constexpr):
    """Products of the last columns of a sum, and waits: sums of 16 bits would be taken apart sooner if it did not."""
    right = queries.slice(FIRST, SOME, dim=1).permute((1, 0))
    return warpgroup_mma(keys.slice(FIRST, SOME, dim=1), right, s, use_acc=ADD, is_async=False)


@gluon.jit
def _begin_scores(x, bar, b, STAGES: gl.constexpr):
    """Begins the products of block b, when those of the block before are issued, all but the last columns of them."""
    WIDTH: gl.constexpr = x.k.shape[2]
    stage = b % STAGES
    other = (b + 1) & 1
    keys = x.k.index(stage)
    queries = _queries_of_tile(x, stage)
    s = gl.zeros((BLOCK, 2 * ROWS), gl.float16, _both_parts())
    mbarrier.wait(bar.full.index(stage), (b // STAGES) & 1)
    mbarrier.wait(bar.turn.index(other), (((b + 1) >> 1) & 1) ^ 1)
    s = _begin_columns(keys, queries, s, 0, WIDTH // 2)
    s = _begin_columns(keys, queries, s, WIDTH // 2, WIDTH // 4)
    s = _begin_columns(keys, queries, s, 3 * WIDTH // 4, WIDTH // 8)
    mbarrier.arrive(bar.turn.index(b & 1), count=1)
    return s


@gluon.jit
def _add_rotary(x, s, stage, BLOCK_P: gl.constexpr):
    """Begins to add rotary scores, if there are any; they are divided by the tile's power of two as well."""
    if BLOCK_P > 0:
        s = warpgroup_mma(x.pe.index(stage), x.q_pe.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _end_scores(x, s, row_scale, factors, b, BLOCK_P: gl.constexpr, STAGES: gl.constexpr):
    """Scores of block b, divided by the tile's power of two; rotary ones are begun."""
    WIDTH: gl.constexpr = x.k.shape[2]
    layout: gl.constexpr = _by_tokens()
    stage = b % STAGES
    s = _end_columns(x.k.index(stage), _queries_of_tile(x, stage), s, 7 * WIDTH // 8, WIDTH // 8, True)
    main, rest = _halves(s)
    s = gl.inline_asm_elementwise(
        SUM_OF_PARTS, "=f,=f,r,r,r", [main, rest, row_scale[None, :]], dtype=gl.float32, is_pure=False, pack=2
    )
    s = gl.convert_layout(s, layout, assert_trivial=True)
    return _add_rotary(x, s * factors[:, None], stage, BLOCK_P)


@gluon.jit
def _begin_group(x, bar, b, STAGES: gl.constexpr):
    """Begins the products of the first group of columns of block b, all but the last columns of them."""
    stage = b % STAGES
    keys = x.k.index(stage)
    queries = _queries_of_tile(x, stage)
    s = gl.zeros((BLOCK, 2 * ROWS), gl.float16, _both_parts())
    mbarrier.wait(bar.full.index(stage), (b // STAGES) & 1)
    s = _begin_columns(keys, queries, s, 0, GROUP // 2)
    return _begin_columns(keys, queries, s, GROUP // 2, GROUP // 4)


@gluon.jit
def _end_groups(x, s, b, BLOCK_P: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """``_end_scores`` with several factors a token: groups of columns one after another, added up in float16."""
    layout: gl.constexpr = _by_tokens()
    by_token: gl.constexpr = gl.SliceLayout(1, layout)
    stage = b % STAGES
    place = b % PLACES
    keys = x.k.index(stage)
    queries = _queries_of_tile(x, stage)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shares = x.shares._reinterpret(gl.float16, [PLACES * FACTORS, BLOCK], line)
    added = gl.zeros((BLOCK, ROWS), gl.float16, layout)
    for k in gl.static_range(GROUPS):
        if k == 0:
            s = _end_columns(keys, queries, s, 3 * GROUP // 4, GROUP // 4, True)
        else:
            s = _end_columns(keys, queries, s, k * GROUP, GROUP, False)
        main, rest = _halves(s)
        # The place is asked for here, or all shares would be loaded, and spilled, before the first products are done.
        share = shares.index(FACTORS * _here(place) + k).load(by_token) * (1 / LARGEST_SHARE)
        main = gl.convert_layout(main, layout, assert_trivial=True)
        rest = gl.convert_layout(rest, layout, assert_trivial=True)
        added = gl.inline_asm_elementwise(
            SUM_OF_GROUP, "=r,r,r,r,r", [main, rest, share[:, None], added], dtype=gl.float16, is_pure=False, pack=2
        )
    row_scale = x.row_scale.load(gl.SliceLayout(0, layout))
    s = gl.inline_asm_elementwise(
        SUM_OF_GROUPS, "=f,=f,r,r", [added, row_scale[None, :]], dtype=gl.float32, is_pure=False, pack=2
    )
    s = s * (x.largest.index(_here(place)).load(by_token) * LARGEST_SHARE)[:, None]
    return _add_rotary(x, s, stage, BLOCK_P)
