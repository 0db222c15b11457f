"""A kernel whose partitions hand numbers to each other as the Hopper kernels do, and nothing else, for racecheck.

    compute-sanitizer --tool racecheck python -m tests.kernels.handed_over WRITERS READERS PARTITIONS BARRIERS

PARTITIONS of WRITERS warps each write their part of an array in shared memory and arrive at a barrier, with a barrier
of all their warps in between; READERS warps wait for it, read the array, and arrive at another, for which the writers
wait before they write again. BARRIERS more are arrived at in the end. What racecheck finds in it says what it can see
of such barriers.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mlacompile.kernels.mla_decode.hopper_room import _barriers

SIZE = gl.constexpr(1024)
ROUNDS = gl.constexpr(4)


@gluon.jit
def _write(array, full, empty, PART: gl.constexpr, PARTS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    o = gl.arange(0, SIZE // PARTS, layout)
    for i in range(ROUNDS):
        mbarrier.wait(empty, (i & 1) ^ 1)
        array.slice(PART * (SIZE // PARTS), SIZE // PARTS).store(o + PART * (SIZE // PARTS) + i)
        mbarrier.arrive(full, count=1)


@gluon.jit
def _read(array, full, empty, more, p_out, MORE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    o = gl.arange(0, SIZE, layout)
    for i in range(ROUNDS):
        mbarrier.wait(full, i & 1)
        found = array.load(layout)
        mbarrier.arrive(empty, count=1)
        gl.store(p_out + i * SIZE + o, found)
    for i in gl.static_range(MORE):
        mbarrier.arrive(more.index(i), count=1)


@gluon.jit
def _handed_over_kernel(p_out, WRITERS: gl.constexpr, PARTS: gl.constexpr, MORE: gl.constexpr, num_warps: gl.constexpr):
    """p_out: int32 [ROUNDS, SIZE]. num_warps: those that read."""
    array = gl.allocate_shared_memory(gl.int32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    more = _barriers(MORE + 1)
    full, empty = _barriers(1, PARTS), _barriers(1)
    if PARTS == 1:
        gl.warp_specialize(
            [(_read, (array, full, empty, more, p_out, MORE)), (_write, (array, full, empty, 0, 1))], [WRITERS], [64]
        )
    else:
        gl.warp_specialize(
            [
                (_read, (array, full, empty, more, p_out, MORE)),
                (_write, (array, full, empty, 0, 2)),
                (_write, (array, full, empty, 1, 2)),
            ],
            [WRITERS, WRITERS],
            [64, 64],
        )


def main() -> None:
    writers, readers, parts, more = map(int, sys.argv[1:])
    out = torch.full((ROUNDS.value, SIZE.value), -1, dtype=torch.int32, device="cuda")
    _handed_over_kernel[(1,)](out, WRITERS=writers, PARTS=parts, MORE=more, num_warps=readers)
    want = torch.arange(SIZE.value, device="cuda") + torch.arange(ROUNDS.value, device="cuda")[:, None]
    assert torch.equal(out, want.int())
    print("handed over", flush=True)


if __name__ == "__main__":
    main()
