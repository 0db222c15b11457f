"""Random inputs of ``quantize_rows``, what they come to in float64, and how far from it a kernel may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.ops.fp8_linear import E4M3
from mlacompile.ops.fp8_quantize import fp8_dequantize
from mlacompile.ops.quantize_rows import STRETCH
from mlacompile.ops.row_product import ACTIVATIONS
from mlacompile.testing.scaled import values

#: What stands before the quantization.
FORMS = (
    "parts, added, normed", "parts, added, normed, squares", "parts, normed, beside", "parts, added, squares, beside",
    "added, normed", "normed", "normed, squares", "silu",
    "gelu_tanh", "heads", "plain",
)  # fmt: skip
PARTS = 3
BESIDE = 96


@dataclass
class Rows:
    """The arguments of one call."""

    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
    settings: dict[str, Any] = field(default_factory=lambda: {"eps": 0.0, "gate": ""})


def make_rows(
    m: int, k: int, form: str, *, kind: str = "plain", dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Rows:
    """Rows ``[m, k]`` of a form, every tensor in the middle of a wider one."""

    def wide(seed: int, width: int = k) -> Tensor:
        around = torch.full((m, width + 256), torch.nan, device=device, dtype=dtype)
        around[:, 128 : 128 + width] = values((m, width), kind, device, seed).to(dtype)
        return around[:, 128 : 128 + width]

    if form == "heads":
        heads = values((k // SCALE_GROUP, m, SCALE_GROUP), kind, device, 0).to(dtype)
        return Rows((heads.transpose(0, 1), None, None, None))
    if form in ACTIVATIONS:
        return Rows((wide(0), None, None, wide(1)), {"eps": 0.0, "gate": form})
    added, normed = wide(1) if "added" in form else None, "normed" in form or "squares" in form
    norm = (1 + values((k,), "plain", device, 2) / 4).to(dtype) if normed else None
    settings: dict[str, Any] = {"eps": 1e-6 if normed else 0.0, "gate": ""}
    if "squares" in form:
        settings["squares"] = True
    if "parts" in form:
        settings |= {"parts": True, "dtype": None if "added" in form else dtype}
        settings["beside"] = BESIDE if "beside" in form else 0
        parts = values((PARTS, m, k + settings["beside"]), kind, device, 0).float()
        return Rows((parts, added, norm, None), settings)
    return Rows((wide(0), added, norm, None), settings)


def total_of(rows: Rows) -> Tensor:
    """What is normed or gated, before that: x and what is added to it, in their dtype."""
    x, added, _, _ = rows.tensors
    whole = summed(rows) if rows.settings.get("parts") else x.flatten(1)
    whole = whole[:, : whole.shape[1] - rows.settings.get("beside", 0)]
    return whole if added is None else whole + added


def summed(rows: Rows) -> Tensor:
    """What parts come to, in the dtype that they are rounded to."""
    x, added, _, _ = rows.tensors
    return sum(x[1:], x[0]).to(rows.settings["dtype"] if added is None else added.dtype)


def exact_rows(rows: Rows) -> Tensor:
    """What is quantized, in float64."""
    _, _, norm, gated = rows.tensors
    y = total_of(rows).double()
    if norm is not None:
        root = torch.rsqrt(y.square().mean(-1, keepdim=True) + rows.settings["eps"])
        y = y * (1.0 if rows.settings.get("squares") else root) * norm.double()
    if gated is not None:
        y = ACTIVATIONS[rows.settings["gate"]](y) * gated.double()
    return y


def worst_rows(rows: Rows, results: list[Tensor]) -> str:
    """What is wrong with results, or nothing.

    A value may be half a step of e4m3 off, of its group's scale, and what float32 makes of it before: sums of k
    squares, an exponential, and some products.
    """
    added = rows.tensors[1]
    if rows.settings.get("squares"):
        *results, squares = results
        stretches = total_of(rows).double().square().split(STRETCH, 1)
        sums = torch.stack([part.sum(1) for part in stretches], 1)
        if squares.shape != sums.shape or not ((squares - sums).abs() <= sums * STRETCH * 2.0**-24).all():
            return f"squares are {list(squares.shape)}, or others"
    if width := rows.settings.get("beside"):
        *results, beside = results
        if not torch.equal(beside, summed(rows)[:, -width:]):
            return "what is beside is another"
    q, descale = results[:2]
    want = exact_rows(rows)
    m, k = want.shape
    if q.shape != (m, k) or q.dtype != E4M3 or descale.shape != (m, scale_groups(k)):
        return f"results are {q.dtype} {list(q.shape)} and {list(descale.shape)}"
    if (len(results) == 3) != (added is not None):
        return f"there are {len(results)} results"
    if added is not None and not torch.equal(results[2], total_of(rows)):
        return "the sum is another"
    wide = descale.double().repeat_interleave(SCALE_GROUP, 1)[:, :k]
    peak = torch.nn.functional.pad(want.abs(), (0, -k % SCALE_GROUP)).unflatten(1, (-1, SCALE_GROUP)).amax(-1)
    expected = torch.where(peak == 0, 1.0, (peak / 448).clamp(min=2.0**-126))
    before = want.abs() * (k + 64) * 2.0**-24 + 2.0**-126
    bound = torch.maximum(want.abs() * 2.0**-4, wide * 2.0**-10) * (1 + 2.0**-10) + before
    off = (fp8_dequantize(q, descale, SCALE_GROUP, torch.float64) - want).abs()
    if not ((descale.double() - expected).abs() <= expected * (k + 64) * 2.0**-24).all():
        return f"scales are off by {float(((descale.double() - expected).abs() / expected).max()):.1e}"
    return "" if (off <= bound).all() else f"values are off by {float((off / bound).max()):.2f} times what they may be"
