"""What all kernels in Gluon for Hopper GPUs use: names that Triton has changed, instructions that it has none for."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

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
