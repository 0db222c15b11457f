"""Which blocks of which rows a program of the Hopper kernel works on, planned on the device.

The blocks of all batch rows, as ``start`` and ``length`` have them, form one line, and every program takes an equal
stretch of it: the host reads no tensor, and a CUDA graph replays whatever the lengths become. Every row has at least
one block, be it empty, so no program waits for a load that nobody issues.

The line is divided into units. A block is one, or, where blocks of some rows take longer (WEIGHED), LIGHT or HEAVY of
them. A program has the blocks whose first unit is in its stretch, and a row ends with the first unit of its last block:
so wherever in a row a stretch begins, a block begins in it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCK = gl.constexpr(64)  # tokens of a block
LIGHT, HEAVY = gl.constexpr(4), gl.constexpr(5)  # units of a block, where P of some rows is float16 and not e4m3
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
def _weight(lo, hi, light_from, WEIGHED: gl.constexpr):
    """Units of a block of a row that sees [lo, hi): LIGHT if these are light_from tokens or more."""
    if WEIGHED:
        return gl.where(hi - lo >= light_from, LIGHT, HEAVY)
    else:
        return 1


@gluon.jit
def _begun(units, weight, WEIGHED: gl.constexpr):
    """How many blocks of that weight begin in the first so many units."""
    if WEIGHED:
        units = gl.maximum(units, 0).to(gl.uint32)  # divided by what the compiler knows
        return gl.where(weight == LIGHT, (units + (LIGHT - 1)) // LIGHT, (units + (HEAVY - 1)) // HEAVY).to(gl.int32)
    else:
        return gl.maximum(units, 0)


@gluon.jit
def _units_of(p_start, p_length, i_b, m_b, T, light_from, WEIGHED: gl.constexpr):
    """Units of batch rows i_b, a scalar or a vector, and of their blocks."""
    lo, hi, _end = _window(p_start, p_length, i_b, m_b, T)
    weight = _weight(lo, hi, light_from, WEIGHED)
    return (_blocks(lo, hi) - 1) * weight + 1, weight


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _over(a, b):
    """a / b, rounded down, of what is not negative: without a sign it takes fewer instructions."""
    return (a.to(gl.uint32) // b.to(gl.uint32)).to(gl.int32)


@gluon.jit
def _shares(total, least, most, weight, B, n_parts, min_share, overhead):
    """How much each part does, and what beginning another row counts, in units. least, most: units of a row.

    weight: of a block, where rows are alike.
    """
    overhead = gl.where(least == most, weight - 1, overhead)
    share = gl.maximum(_over(total + overhead * B + n_parts - 1, n_parts), overhead + min_share)
    if least == most:
        whole = most + weight - 1  # all units of all blocks
        even = _over(share + whole - 1, whole) * whole  # whole rows
        padding = 0
        if share < whole:
            pieces = _over(whole, share)
            even = _over(whole + pieces * weight - 1, pieces * weight) * weight
            padding = even * pieces - whole
        if (even.to(gl.float32) <= share.to(gl.float32) * SNAP) & (padding < even):
            share = even
            overhead = padding + weight - 1
    return share, overhead


@gluon.jit
def _plan(p_start, p_length, B, T, part, n_parts, min_share, overhead, CHUNK: gl.constexpr, MANY: gl.constexpr,
          light_from=0, WEIGHED: gl.constexpr = False):  # fmt: skip
    """How much each part does, and where this one begins: share, overhead, row, position in that row, in units.

    min_share, overhead: in blocks. overhead: what beginning another row costs a program. Positions count so many
    imaginary units before a row's first: many short rows weigh more than one long one. CHUNK: batch rows that are
    looked at together. MANY: there are more rows than that. light_from, WEIGHED: as in ``_weight``.
    """
    if WEIGHED:
        min_share *= LIGHT
        overhead = overhead * LIGHT + LIGHT - 1  # of a row's last block there is only the first unit
    if CHUNK == 1:
        only, weight = _units_of(p_start, p_length, gl.to_tensor(0), None, T, light_from, WEIGHED)
        share, overhead = _shares(only, only, only, weight, 1, n_parts, min_share, overhead)
        begin = part * share
        beyond = begin >= only + overhead
        return share, overhead, beyond.to(gl.int32), begin - gl.where(beyond, only + overhead, 0)
    else:
        return _plan_of_rows(
            p_start, p_length, B, T, part, n_parts, min_share, overhead, CHUNK, MANY, light_from, WEIGHED
        )


@gluon.jit
def _plan_of_rows(p_start, p_length, B, T, part, n_parts, min_share, overhead, CHUNK: gl.constexpr,
                  MANY: gl.constexpr, light_from, WEIGHED: gl.constexpr):  # fmt: skip
    """``_plan`` for more batch rows than one, of min_share and overhead in units."""
    # Every warp holds all rows of a chunk, so sums and maxima need no shared memory.
    layout: gl.constexpr = gl.BlockedLayout([CHUNK // 32], [32], [gl.num_warps()], [0])
    o_b = gl.arange(0, CHUNK, layout)
    m_b = o_b < B
    chunk, weight = _units_of(p_start, p_length, o_b, m_b, T, light_from, WEIGHED)
    total = gl.sum(gl.where(m_b, chunk, 0), 0)
    most = gl.max(gl.where(m_b, chunk, 0), 0)
    least = gl.min(gl.where(m_b, chunk, 0x7FFFFFFF), 0)
    if MANY:
        for b in range(CHUNK, B, CHUNK):
            m_b = b + o_b < B
            units, _weights = _units_of(p_start, p_length, b + o_b, m_b, T, light_from, WEIGHED)
            total += gl.sum(gl.where(m_b, units, 0), 0)
            most = gl.maximum(most, gl.max(gl.where(m_b, units, 0), 0))
            least = gl.minimum(least, gl.min(gl.where(m_b, units, 0x7FFFFFFF), 0))
    if WEIGHED:  # looked at where rows are alike; they may have as many units by chance, and either weight will do then
        weight = gl.max(gl.where(m_b, weight, 0), 0)
    share, overhead = _shares(total, least, most, weight, B, n_parts, min_share, overhead)

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
            units, _weights = _units_of(p_start, p_length, b + o_b, m_b, T, light_from, WEIGHED)
            ends = seen + gl.associative_scan(gl.where(m_b, units + overhead, 0), 0, _add)
            done = m_b & (ends <= begin)
            row += gl.sum(done.to(gl.int32), 0)
            before = gl.maximum(before, gl.max(gl.where(done, ends, 0), 0))
            seen = gl.max(ends, 0)
    return share, overhead, row, begin - before


@gluon.jit
def _item(p_start, p_length, row, position, todo, overhead, T, light_from=0, WEIGHED: gl.constexpr = False):
    """The next stretch of one row: lo, hi and end, its first token, its number of blocks, and what it is of ``todo``.

    skip: blocks of the row that earlier parts do. rest: units that later parts do.
    """
    lo, hi, end = _window(p_start, p_length, row, None, T)
    weight = _weight(lo, hi, light_from, WEIGHED)
    size = (_blocks(lo, hi) - 1) * weight + 1 + overhead
    taken = gl.minimum(size - position, todo)
    skip = _begun(position - overhead, weight, WEIGHED)
    n = _begun(position + taken - overhead, weight, WEIGHED) - skip
    return lo, hi, end, (lo // BLOCK + skip) * BLOCK, n, skip, size - position - taken, taken
