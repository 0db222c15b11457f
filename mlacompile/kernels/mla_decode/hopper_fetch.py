"""The partition of one warp that fetches the cache by TMA, contiguous or by pages, into two stages of shared memory."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mlacompile.kernels.hopper import _here, load_tile
from mlacompile.kernels.mla_decode.hopper_plan import BLOCK, _item


@gluon.jit
def _page(p_pages, column, n_pages):
    """An entry of a batch row's line of the block table, kept inside the cache whatever it says."""
    return gl.minimum(gl.maximum(gl.load(p_pages + column), 0), n_pages - 1)


@gluon.jit
def _unit(p_pages, row, t, n_pages, n_columns, PAGE: gl.constexpr):
    """The page of a token, kept inside the cache whatever the table says; of a contiguous cache its batch row."""
    if PAGE > 0:
        return _page(p_pages, gl.minimum(t.to(gl.uint32) // PAGE, n_columns.to(gl.uint32) - 1), n_pages)
    else:
        return row


@gluon.constexpr_function
def _columns(shape):
    """Columns of a box: a box of rank 1 has one."""
    return shape[1] if len(shape) > 1 else 1


@gluon.constexpr_function
def _tokens(shape):
    """Tokens of a box: [tokens], [tokens, columns] or [panels, tokens, columns]."""
    return shape[-2] if len(shape) > 1 else shape[0]


@gluon.constexpr_function
def _boxes(count, shape):
    """The shape of so many boxes."""
    return [count, *shape]


@gluon.jit
def _scales_at(stage, QUARTER: gl.constexpr, G: gl.constexpr):
    """Where a stage's [64, G] factors stand, counted in such boxes: behind the bytes of its first quarter."""
    return stage * (QUARTER // G) + QUARTER // (4 * G)


@gluon.jit
def _copy(desc, apart, column, full, to, first, N: gl.constexpr, unit, p_pages, t, n_pages, n_columns,
          PAGE: gl.constexpr):  # fmt: skip
    """Send for N panels of a block's columns. to: boxes of shared memory, those of panel k begin at (first + k) * SUB.

    unit: the page or batch row of the block, where one is enough; smaller pages are looked up here. A box of rank 3
    holds all N panels.
    """
    BOX: gl.constexpr = _tokens(desc.block_type.shape)
    SUB: gl.constexpr = BLOCK // BOX
    for j in range(SUB):  # not unrolled: this partition has few registers
        o_t = t + j * BOX
        if SUB > 1:
            unit = _unit(p_pages, unit, o_t, _here(n_pages), n_columns, PAGE)
        if PAGE > 0:
            o_t = o_t & (PAGE - 1)
        o_row = unit * apart + o_t
        if len(desc.block_type.shape) == 1:
            load_tile(desc, [o_row], full, to.index(first * SUB + j))
        elif len(desc.block_type.shape) == 3:
            load_tile(desc, [column // desc.block_type.shape[2], o_row, 0], full, to.index(first // N))
        else:
            for k in gl.static_range(N):
                o_c = column + k * desc.block_type.shape[1]
                load_tile(desc, [o_row, o_c], full, to.index((first + k) * SUB + j))


@gluon.jit
def _fetch(x, bar, arrived, d_c, d_pe, d_scale, p_start, p_length, p_table, row, position, share, overhead, B, T,
           apart_c, apart_pe, apart_scale, n_pages, stride_table, n_columns, LEFT: gl.constexpr, QUARTER: gl.constexpr,
           BLOCK_P: gl.constexpr, PAGE: gl.constexpr, HALVES: gl.constexpr):  # fmt: skip
    """Copies blocks into the two stages, part by part, as soon as each part has been used for the last time.

    arrived: barriers of the parts. HALVES: the left columns are two, the second of which falls free last. What is
    narrower than 16 bits fills the first half of its part only; its factors (d_scale) stand where the second half of
    the first quarter begins.
    """
    BOX: gl.constexpr = d_c.block_type.shape[0]
    PANEL: gl.constexpr = d_c.block_type.shape[1]
    SUB: gl.constexpr = BLOCK // BOX
    BYTES: gl.constexpr = d_c.dtype.primitive_bitwidth // 8
    N_LEFT: gl.constexpr = LEFT // PANEL
    N_SOONER: gl.constexpr = N_LEFT // 2 if HALVES else N_LEFT
    N_QUARTER: gl.constexpr = QUARTER // PANEL
    PITCH: gl.constexpr = 2 // BYTES
    left = x.left._reinterpret(d_c.dtype, [2 * N_LEFT * PITCH * SUB, BOX, PANEL], d_c.layout)
    right = x.right._reinterpret(d_c.dtype, [4 * N_QUARTER * PITCH * SUB, BOX, PANEL], d_c.layout)
    pe = x.pe
    if BLOCK_P > 0:
        pe = x.pe._reinterpret(d_pe.dtype, [2 * SUB, BOX, BLOCK_P], d_pe.layout)
    scales = x.right
    G: gl.constexpr = 0 if d_scale is None else _columns(d_scale.block_type.shape)
    if d_scale is not None:
        count: gl.constexpr = 2 * QUARTER // G * SUB
        scales = x.right._reinterpret(gl.float32, _boxes(count, d_scale.block_type.shape), d_scale.layout)
    g = 0
    todo = share
    while (row < B) & (todo > overhead):
        _lo, _hi, _end, t, n, _skip, _rest, taken = _item(p_start, p_length, row, position, todo, overhead, T)
        todo = _here(todo - taken)  # one register less that the loop has to keep
        p_pages = p_table
        if PAGE > 0:
            p_pages += row.to(gl.int64) * stride_table
        unit = row
        if SUB == 1:
            unit = _unit(p_pages, row, t, n_pages, n_columns, PAGE)
        for i in range(g, g + n):
            stage = i & 1
            free = ((i >> 1) & 1) ^ 1
            ahead = unit
            if SUB == 1:  # the next block's page is looked up now, its address is needed at once then
                ahead = _unit(p_pages, row, t + BLOCK, n_pages, n_columns, PAGE)

            mbarrier.wait(bar.first_empty.index(stage), free)
            full = arrived.first.index(stage)
            mbarrier.expect(full, BLOCK * (QUARTER * BYTES + BLOCK_P * 2 + G * 4))
            _copy(d_c, apart_c, LEFT, full, right, 2 * stage * N_QUARTER * PITCH, N_QUARTER,
                  unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            if BLOCK_P > 0:
                _copy(d_pe, apart_pe, 0, full, pe, stage, 1,
                      unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            if d_scale is not None:
                _copy(d_scale, apart_scale, 0, full, scales, _scales_at(stage, QUARTER, G), 1,
                      unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip

            mbarrier.wait(bar.left_empty.index(stage), free)
            full = arrived.left.index(stage)
            mbarrier.expect(full, BLOCK * N_SOONER * PANEL * BYTES)
            _copy(d_c, apart_c, 0, full, left, stage * N_LEFT * PITCH, N_SOONER,
                  unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip

            mbarrier.wait(bar.last_empty.index(stage), free)
            full = arrived.last.index(stage)
            mbarrier.expect(full, BLOCK * QUARTER * BYTES)
            _copy(d_c, apart_c, LEFT + QUARTER, full, right, (2 * stage + 1) * N_QUARTER * PITCH, N_QUARTER,
                  unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip

            if HALVES:
                mbarrier.wait(bar.late_empty.index(stage), free)
                full = arrived.late.index(stage)
                mbarrier.expect(full, BLOCK * N_SOONER * PANEL * BYTES)
                _copy(d_c, apart_c, N_SOONER * PANEL, full, left, stage * N_LEFT * PITCH + N_SOONER, N_SOONER,
                      unit, p_pages, t, n_pages, n_columns, PAGE)  # fmt: skip
            unit = ahead
            t += BLOCK
        g += n
        row += 1
        position = 0
