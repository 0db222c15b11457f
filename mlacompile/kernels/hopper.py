"""What all kernels in Gluon for Hopper GPUs use: names that Triton has changed, instructions that it has none for."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

from mlacompile.kernels.drop import DROP

# Renamed after Triton 3.6.
aggregate = getattr(core, "aggregate", None) or core._aggregate
all_warps = getattr(gl, "barrier", None) or gl.thread_barrier
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _here(x):
    """x, but the compiler must not know: what follows from it is computed here, not kept in registers from before."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _wait_for_earlier():
    """Wait for what was launched before this kernel. Until then only memory of the program's own may be touched."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _launch_later():
    """Let the next kernel be launched while the last programs drain.

    Not sooner: programs that are launched while most SMs are taken crowd on the few others, and stay there.
    """
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _drop(p, mask):
    """``_drop`` of ``drop.py`` in Gluon, which cannot call functions of Triton."""
    at = gl.where(mask, p.to(gl.int64, bitcast=True), 0)
    gl.inline_asm_elementwise(DROP, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


ANY = gl.constexpr(
    "{ .reg .pred any; setp.ne.b32 any, $1, 0; barrier.cta.red.or.pred any, BARRIER, 128, any; "
    "selp.b32 any_of_side, 1, 0, any; mov.b32 $0, any_of_side; }"
)


@gluon.constexpr_function
def _of_side(code, side):
    """Code for a partition of that number: its register and its barrier are none of those that Triton uses."""
    return code.replace("any_of_side", f"any_of_{side}").replace("BARRIER", str(14 + side))


@gluon.jit
def _declare_any(SIDE: gl.constexpr):
    """What ``_any_thread`` of a partition of that number passes its result in. Once, and before it."""
    CODE: gl.constexpr = _of_side(".reg .b32 any_of_side; // $0", SIDE)
    gl.inline_asm_elementwise(CODE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _any_thread(x, SIDE: gl.constexpr):
    """Whether x, of which each thread of four warps has one element, is true of any. All wait for each other.

    The barrier itself says so, at no more than what it costs to wait. As a tensor: its result, which is the same in
    all threads, becomes a number by way of a register of its own. Two partitions can do this, as SIDE 0 and 1.
    """
    ASK: gl.constexpr = _of_side(ANY, SIDE)
    gl.inline_asm_elementwise(ASK, "=r,r", [gl.where(x, 1, 0)], dtype=gl.int32, is_pure=False, pack=1)
    READ: gl.constexpr = _of_side("mov.b32 $0, any_of_side;", SIDE)
    return gl.inline_asm_elementwise(READ, "=r", [], dtype=gl.int32, is_pure=False, pack=1) != 0
