"""Launches the Triton kernel of ``quantize_rows``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels.device import chains
from mlacompile.kernels.drop import LINE, in_whole_lines
from mlacompile.kernels.launch import chained
from mlacompile.kernels.quantize_rows.portable import _quantize_rows_kernel
from mlacompile.ops.quantize_rows import STRETCH, empty_results

#: Groups of a program that need not have a whole row: 2048 values, eight a thread.
SOME_GROUPS = STRETCH // SCALE_GROUP
LINE_OF_PARTS = LINE // 4  # values
_DTYPES: dict[torch.dtype | None, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def quantize_rows_triton(
    x: Tensor, added: Tensor | None, norm: Tensor | None, gated: Tensor | None, done: Tensor | None = None, *,
    eps: float, gate: str, parts: bool = False, squares: bool = False, spent: bool = False, beside: int = 0,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """``quantize_rows`` by the Triton kernel, for inputs that ``triton_reasons`` has nothing against."""
    results = empty_results(x, added, parts=parts, squares=squares, beside=beside, dtype=dtype)
    settings: dict[str, Any] = {"eps": eps, "gate": gate, "parts": parts, "squares": squares, "spent": spent}
    settings |= {"beside": beside, "dtype": dtype}
    grid, arguments, options = launch(x, added, norm, gated, results, done, **settings)
    if grid[0] and grid[1]:
        _quantize_rows_kernel[grid](**arguments, **options)
    return results


def launch(
    x: Tensor, added: Tensor | None, norm: Tensor | None, gated: Tensor | None, results: list[Tensor],
    done: Tensor | None = None, *, eps: float, gate: str, parts: bool = False, squares: bool = False,
    spent: bool = False, beside: int = 0, dtype: torch.dtype | None = None,
) -> tuple[tuple[int, int], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Grid, arguments and options of one launch. Meta tensors do, to compile without a GPU."""
    m, k = results[0].shape
    all_groups = triton.next_power_of_2(max(scale_groups(k), 1))
    groups = all_groups if norm is not None and not squares else min(all_groups, SOME_GROUPS)
    warps = min(16, max(1, groups // 2))
    spent = spent and k % SCALE_GROUP == 0 and beside % LINE_OF_PARTS == 0 and in_whole_lines(x)
    spent = spent and (gated is None or (in_whole_lines(gated) and _apart(x, gated)))
    summed = dtype if added is None else added.dtype
    done = done if done is not None and in_whole_lines(done.view(-1)) else None
    arguments = {
        "p_x": x, "p_added": added, "p_norm": norm, "p_gated": gated, "p_q": results[0], "p_descale": results[1],
        "p_total": None if added is None else results[2], "p_squares": results[-1] if squares else None,
        "p_beside": results[-1 - squares] if beside else None, "K": k, "BESIDE": beside,
        "eps": eps, "stride_xp": x.stride(0), "stride_xm": x.stride(int(parts)),
        "stride_xg": x.stride(1) if x.dim() == 3 and not parts else SCALE_GROUP,
        "stride_am": 0 if added is None else added.stride(0), "stride_gm": 0 if gated is None else gated.stride(0),
        "PARTS": x.shape[0] if parts else 1, "SUM": _DTYPES[summed] if parts else None,
        "GROUPS": groups, "GATE": gate, "PDL": chains(x.device),
        "p_done": done, "done_lines": 0 if done is None else done.numel() * done.itemsize // LINE, "SPENT": spent,
        "THREADS": 32 * warps,
    }  # fmt: skip
    options = {"num_warps": warps, **chained(x.device)}
    return (m, -(-scale_groups(k) // groups) + -(-scale_groups(beside) // groups)), arguments, options


def _apart(x: Tensor, gated: Tensor) -> bool:
    """Whether no line of one lies in a row of the other, where another program may still read it."""
    between = abs(gated.data_ptr() - x.data_ptr())
    return x.device.type == "meta" or between == 0 or between >= gated.shape[-1] * gated.itemsize
