"""``mla_decode`` on a CPU in float32, by a loop in C++ (``cpu_loop.cpp``) that passes over the cache once.

Compiled when first called, by the compiler that Inductor uses, and kept in Inductor's folder. Where there is none, or
what is asked for is more than the loop knows, ``cpu.py`` has another way.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mlacompile.logs import log

_WIDEST = 16  # floats in the widest vector that the loop knows: it steps through a rank by vectors
_SPLIT = 256  # tokens; below that, beginning and merging cost more than a thread brings

Window = tuple[int, int]


def loop_reasons(q_latent: Tensor, mask: Tensor | None, descale: Tensor | None) -> list[str]:
    """Why the loop cannot take a call whose tokens have their values beside each other; empty when it can."""
    reasons = []
    if q_latent.dtype != torch.float32 or descale is not None:
        reasons.append("the loop knows float32 alone")
    if mask is not None:
        reasons.append("the loop knows no mask")
    if q_latent.shape[3] % _WIDEST:
        reasons.append(f"the rank is no multiple of {_WIDEST}")
    if not reasons and library() is None:
        reasons.append("there is no C++ compiler")
    return reasons


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loop; None where it cannot be compiled, which is said once."""
    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    try:
        from torch._inductor.codecache import CppCodeCache

        found: ctypes.CDLL = CppCodeCache.load(source)
        pointers, sizes = [ctypes.c_void_p], [ctypes.c_int64]
        found.mla_decode_room.argtypes, found.mla_decode_room.restype = sizes * 5, ctypes.c_int64
        found.mla_decode.argtypes = pointers * 4 + sizes * 4 + pointers * 5 + sizes * 7 + [ctypes.c_float]
        found.mla_decode.restype = None
    except Exception as error:  # whatever a compiler, or what there is instead of one, may say
        log.info("attention on a CPU stays with the library: %s could not be compiled: %s", Path(__file__).stem, error)
        return None
    return found


def mla_decode_loop(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    windows: Sequence[Window],
    last: Sequence[int] | None,
    *,
    scale: float,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``mla_decode`` for inputs that ``loop_reasons`` has nothing against.

    windows: for each batch row the first token that it may see, and one past the last.
    last: for each batch row where causal queries end, None when not causal.
    splits: of a batch row's tokens; None lets the shape decide.
    """
    b, h, s, r = q_latent.shape
    q_latent = q_latent.contiguous()
    if q_pe is None or k_pe is None:
        q_pe, k_pe = q_latent, c_kv[..., :0]
    q_pe = q_pe.contiguous()
    threads = torch.get_num_threads()
    if splits is None:
        longest = max(end - first for first, end in windows)
        splits = max(min(threads // math.gcd(b, threads), longest // _SPLIT), 1)
    starts = (ctypes.c_int64 * b)(*(first for first, _ in windows))
    ends = (ctypes.c_int64 * (b * s))(*_ends(windows, last, s))
    out, lse = q_latent.new_empty(b, h, s, r), q_latent.new_empty(b, h, s)
    loop, rope = library(), k_pe.shape[2]
    assert loop is not None
    room = q_latent.new_empty(loop.mla_decode_room(b, h * s, r, rope, splits))
    inputs = (q_latent.data_ptr(), q_pe.data_ptr(), c_kv.data_ptr(), k_pe.data_ptr())
    strides = (c_kv.stride(0), c_kv.stride(1), k_pe.stride(0), k_pe.stride(1))
    outputs = (out.data_ptr(), lse.data_ptr(), room.data_ptr())
    loop.mla_decode(*inputs, *strides, starts, ends, *outputs, b, h, s, r, rope, splits, threads, scale)
    return out, lse


def _ends(windows: Sequence[Window], last: Sequence[int] | None, queries: int) -> list[int]:
    """One past the last token that each query of each batch row sees."""
    if last is None:
        return [end for _, end in windows for _ in range(queries)]
    rows = zip(windows, last, strict=True)
    return [min(end, n - queries + i + 1) for (_, end), n in rows for i in range(queries)]
