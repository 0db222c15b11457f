"""Fetches blocks of an FP8 cache for ``hopper_turned.py``: by a warp of its own, or by those that compute scores.

``cache``: descriptors of latents, rotary keys and factors, how many rows of each lie between units, the block table:
(d_c, d_pe, d_scale, apart_c, apart_pe, apart_scale, p_table, stride_table, n_pages, n_columns).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mlacompile.kernels.mla_decode.hopper_fetch import _boxes, _columns, _copy, _tokens, _unit
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item


@gluon.jit
def _fetch_block(x, bar, cache, b, unit, p_pages, t, WIDTH: gl.constexpr, BLOCK_P: gl.constexpr, PAGE: gl.constexpr,
                 STAGES: gl.constexpr):  # fmt: skip
    """Sends for block b, latents, factors and rotary keys, when its stage has been used for the last time."""
    d_c, d_pe, d_scale, apart_c, apart_pe, apart_scale, _p_table, _stride_table, n_pages, n_columns = cache
    BOX: gl.constexpr = _tokens(d_c.block_type.shape)
    PANEL: gl.constexpr = d_c.block_type.shape[-1]
    SUB: gl.constexpr = BLOCK // BOX
    PANELS: gl.constexpr = WIDTH // PANEL
    PLACES: gl.constexpr = x.factors.shape[0]
    BOXES: gl.constexpr = STAGES * PANELS * SUB // (PANELS if len(d_c.block_type.shape) == 3 else 1)
    stage = b % STAGES
    mbarrier.wait(bar.empty.index(stage), ((b // STAGES) & 1) ^ 1)
    full = bar.full.index(stage)
    mbarrier.expect(full, BLOCK * (WIDTH + 2 * BLOCK_P + 4 * _columns(d_scale.block_type.shape)))
    latents = x.k._reinterpret(d_c.dtype, _boxes(BOXES, d_c.block_type.shape), d_c.layout)
    _copy(d_c, apart_c, 0, full, latents, stage * PANELS, PANELS, unit, p_pages, t, n_pages, n_columns, PAGE)
    factors = x.factors._reinterpret(gl.float32, _boxes(PLACES * SUB, d_scale.block_type.shape), d_scale.layout)
    _copy(d_scale, apart_scale, 0, full, factors, b % PLACES, 1, unit, p_pages, t, n_pages, n_columns, PAGE)
    if BLOCK_P > 0:
        pe = x.pe._reinterpret(d_pe.dtype, [STAGES * SUB, BOX, BLOCK_P], d_pe.layout)
        _copy(d_pe, apart_pe, 0, full, pe, stage, 1, unit, p_pages, t, n_pages, n_columns, PAGE)


@gluon.jit
def _pages_of(cache, row, PAGE: gl.constexpr):
    """A batch row's line of the block table."""
    p_table = cache[6]
    if PAGE > 0:
        p_table += row.to(gl.int64) * cache[7]
    return p_table


@gluon.jit
def _fetch_stages(x, bar, cache, p_start, p_length, row, position, share, overhead, B, T, WIDTH: gl.constexpr,
                  BLOCK_P: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copies blocks into the stages, as soon as each has been used for the last time."""
    n_pages, n_columns = cache[8], cache[9]
    SUB: gl.constexpr = BLOCK // _tokens(cache[0].block_type.shape)
    g = 0
    todo = share
    while (row < B) & (todo > overhead):
        _lo, _hi, _end, t, n, _skip, _rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        p_pages = _pages_of(cache, row, PAGE)
        unit = row
        if SUB == 1:
            unit = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        for i in range(g, g + n):
            ahead = unit
            if SUB == 1:  # the next block's page is looked up now, its address is needed at once then
                ahead = _unit(p_pages, row, t + BLOCK, n_pages, n_columns, PAGE)
            _fetch_block(x, bar, cache, i, unit, p_pages, t, WIDTH, BLOCK_P, PAGE, STAGES)
            unit = ahead
            t += BLOCK
        g += n
        todo -= taken
        row += 1
        position = 0
