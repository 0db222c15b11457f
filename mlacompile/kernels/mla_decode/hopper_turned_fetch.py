"""Fetches blocks of an FP8 cache for ``hopper_turned.py``: by a warp of its own, or by those that compute their scores."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mlacompile.kernels.mla_decode.hopper_fetch import _boxes, _columns, _copy, _unit
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item
from mlacompile.kernels.mla_decode.hopper_turned_room import _full


@gluon.jit
def _fetch_part(x, bar, d_c, d_pe, d_scale, apart_c, apart_pe, apart_scale, stage, unit, p_pages, t, n_pages, n_columns,
                WIDTH: gl.constexpr, BLOCK_P: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
                I: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """Sends for part I of PARTS of a block's latents, and with the last for its factors and rotary keys."""
    BOX: gl.constexpr = d_c.block_type.shape[0]
    PANEL: gl.constexpr = d_c.block_type.shape[1]
    SUB: gl.constexpr = BLOCK // BOX
    PANELS: gl.constexpr = WIDTH // PANEL
    SOME: gl.constexpr = PANELS // PARTS
    LAST: gl.constexpr = I == PARTS - 1
    MORE: gl.constexpr = 2 * BLOCK_P + 4 * _columns(d_scale.block_type.shape) if LAST else 0
    latents = x.k._reinterpret(d_c.dtype, [STAGES * PANELS * SUB, BOX, PANEL], d_c.layout)
    full = _full(bar, stage, I)
    mbarrier.expect(full, BLOCK * (SOME * PANEL + MORE))
    _copy(d_c, apart_c, I * SOME * PANEL, full, latents, stage * PANELS + I * SOME, SOME,
          unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
    if LAST:
        factors = x.factors._reinterpret(gl.float32, _boxes(STAGES * SUB, d_scale.block_type.shape), d_scale.layout)
        _copy(d_scale, apart_scale, 0, full, factors, stage, 1, unit, p_pages, t, n_pages, n_columns, PAGE)
        if BLOCK_P > 0:
            pe = x.pe._reinterpret(d_pe.dtype, [STAGES * SUB, BOX, BLOCK_P], d_pe.layout)
            _copy(d_pe, apart_pe, 0, full, pe, stage, 1, unit, p_pages, t, n_pages, n_columns, PAGE)


@gluon.jit
def _fetch_stages(x, bar, d_c, d_pe, d_scale, p_start, p_length, p_table, row, position, share, overhead, B, T,
                  apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, WIDTH: gl.constexpr,
                  BLOCK_P: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copies blocks into the stages, as soon as each has been used for the last time."""
    SUB: gl.constexpr = BLOCK // d_c.block_type.shape[0]
    g = 0
    todo = share
    while (row < B) & (todo > overhead):
        _lo, _hi, _end, t, n, _skip, _rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        p_pages = p_table
        if PAGE > 0:
            p_pages += row.to(gl.int64) * stride_table
        unit = row
        if SUB == 1:
            unit = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        for i in range(g, g + n):
            stage = i % STAGES
            ahead = unit
            if SUB == 1:  # the next block's page is looked up now, its address is needed at once then
                ahead = _unit(p_pages, row, t + BLOCK, n_pages, n_columns, PAGE)
            mbarrier.wait(bar.empty.index(stage), ((i // STAGES) & 1) ^ 1)
            _fetch_part(x, bar, d_c, d_pe, d_scale, apart_c, apart_pe, apart_scale, stage, unit, p_pages, t, n_pages,
                        n_columns, WIDTH, BLOCK_P, PAGE, STAGES, 0, 1)  # fmt: skip
            unit = ahead
            t += BLOCK
        g += n
        todo -= taken
        row += 1
        position = 0
