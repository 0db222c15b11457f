"""Which blocks of which rows a program of the Hopper kernel works on, planned on the device.

The blocks of all batch rows, as ``start`` and ``length`` have them, form one line, and every program takes an equal
stretch of it: the host reads no tensor, and a CUDA graph replays whatever the lengths become. Every row has at least
one block, be it empty, so no program waits for a load that nobody issues.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCK = gl.constexpr(64)  # tokens of a block
SNAP = gl.constexpr(1.08)  # rows of equal length are cut evenly if that makes the longest share at most so much longer


@gluon.jit
def _bound(p, i_b, m_b):
    if m_b is None:
        return gl.load(p + i_b)
    else:
        return gl.load(p + i_b, mask=m_b, other=0)


@gluon.jit
def _window(p_start, p_length, i_b, m_b, T):
    """The live tokens [lo, hi) of batch rows i_b, a scalar or a vector, and their ``length`` as it was given."""
    lo = i_b * 0
    end = i_b * 0 + T
    if p_start is not None:
        lo = gl.minimum(gl.maximum(_bound(p_start, i_b, m_b), 0), T)
    if p_length is not None:
        end = _bound(p_length, i_b, m_b)
    return lo, gl.minimum(gl.maximum(end, 0), T), end


@gluon.jit
def _blocks(lo, hi):
    """How many blocks cover [lo, hi), counted from the one that holds lo; at least one."""
    return gl.maximum((hi + BLOCK - 1) // BLOCK - lo // BLOCK, 1)


@gluon.jit
def _blocks_of(p_start, p_length, i_b, m_b, T):
    lo, hi, _end = _window(p_start, p_length, i_b, m_b, T)
    return _blocks(lo, hi)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _over(a, b):
    """a / b, rounded down, of what is not negative: without a sign it takes fewer instructions."""
    return (a.to(gl.uint32) // b.to(gl.uint32)).to(gl.int32)


@gluon.jit
def _shares(total, least, most, B, n_parts, min_share, overhead):
    """How much each part does, and what beginning another row counts. least, most: blocks of a row."""
    overhead = gl.where(least == most, 0, overhead)
    share = gl.maximum(_over(total + overhead * B + n_parts - 1, n_parts), overhead + min_share)
    if least == most:
        even = _over(share + most - 1, most) * most  # whole rows
        padding = 0
        if share < most:
            pieces = _over(most, share)
            even = _over(most + pieces - 1, pieces)
            padding = even * pieces - most
        if (even.to(gl.float32) <= share.to(gl.float32) * SNAP) & (padding < even):
            share = even
            overhead = padding
    return share, overhead


@gluon.jit
def _plan(p_start, p_length, B, T, part, n_parts, min_share, overhead, CHUNK: gl.constexpr, MANY: gl.constexpr):
    """How much each part does, and where this one begins: share, overhead, row, position in that row's blocks.

    overhead: what beginning another row costs a program, in blocks. Positions count so many imaginary blocks before a
    row's first: many short rows weigh more than one long one. CHUNK: batch rows that are looked at together. MANY:
    there are more rows than that.
    """
    if CHUNK == 1:
        only = _blocks_of(p_start, p_length, gl.to_tensor(0), None, T)
        share, overhead = _shares(only, only, only, 1, n_parts, min_share, overhead)
        begin = part * share
        beyond = begin >= only + overhead
        return share, overhead, beyond.to(gl.int32), begin - gl.where(beyond, only + overhead, 0)
    else:
        return _plan_of_rows(p_start, p_length, B, T, part, n_parts, min_share, overhead, CHUNK, MANY)


@gluon.jit
def _plan_of_rows(p_start, p_length, B, T, part, n_parts, min_share, overhead, CHUNK: gl.constexpr,
                  MANY: gl.constexpr):  # fmt: skip
    """``_plan`` for more batch rows than one."""
    # Every warp holds all rows of a chunk, so sums and maxima need no shared memory.
    layout: gl.constexpr = gl.BlockedLayout([CHUNK // 32], [32], [gl.num_warps()], [0])
    o_b = gl.arange(0, CHUNK, layout)
    m_b = o_b < B
    chunk = _blocks_of(p_start, p_length, o_b, m_b, T)
    total = gl.sum(gl.where(m_b, chunk, 0), 0)
    most = gl.max(gl.where(m_b, chunk, 0), 0)
    least = gl.min(gl.where(m_b, chunk, 0x7FFFFFFF), 0)
    if MANY:
        for b in range(CHUNK, B, CHUNK):
            m_b = b + o_b < B
            blocks = _blocks_of(p_start, p_length, b + o_b, m_b, T)
            total += gl.sum(gl.where(m_b, blocks, 0), 0)
            most = gl.maximum(most, gl.max(gl.where(m_b, blocks, 0), 0))
            least = gl.minimum(least, gl.min(gl.where(m_b, blocks, 0x7FFFFFFF), 0))
    share, overhead = _shares(total, least, most, B, n_parts, min_share, overhead)

    begin = part * share
    m_b = o_b < B
    ends = gl.associative_scan(gl.where(m_b, chunk + overhead, 0), 0, _add)
    done = m_b & (ends <= begin)
    row = gl.sum(done.to(gl.int32), 0)
    before = gl.max(gl.where(done, ends, 0), 0)
    if MANY:
        seen = gl.max(ends, 0)
        for b in range(CHUNK, B, CHUNK):
            m_b = b + o_b < B
            blocks = gl.where(m_b, _blocks_of(p_start, p_length, b + o_b, m_b, T) + overhead, 0)
            ends = seen + gl.associative_scan(blocks, 0, _add)
            done = m_b & (ends <= begin)
            row += gl.sum(done.to(gl.int32), 0)
            before = gl.maximum(before, gl.max(gl.where(done, ends, 0), 0))
            seen = gl.max(ends, 0)
    return share, overhead, row, begin - before


@gluon.jit
def _item(p_start, p_length, row, position, todo, overhead, T):
    """The next stretch of one row: lo, hi and end, its first token, its number of blocks, and what it is of ``todo``.

    skip: blocks of the row that earlier parts do. rest: blocks that later parts do.
    """
    lo, hi, end = _window(p_start, p_length, row, None, T)
    blocks = _blocks(lo, hi)
    taken = gl.minimum(blocks + overhead - position, todo)
    skip = gl.maximum(position - overhead, 0)
    n = position + taken - overhead - skip
    return lo, hi, end, (lo // BLOCK + skip) * BLOCK, n, skip, blocks - skip - n, taken
