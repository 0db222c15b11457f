"""From formulas to figures: FLOPs, bytes and seconds of a form at given sizes on given hardware.

The formulas are turned into Python functions once (``lambdify``), so that choosing a form costs microseconds a site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import sympy

from mlacompile.cost import forms
from mlacompile.cost.hardware import Hardware
from mlacompile.geometry import MLAGeometry

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
#: Bytes of keys and values that may be expanded at a time, and tokens of one sequence, at least and at most.
EXPANDED_AT_ONCE = 1 << 30
CHUNKS = (256, 8192)


@dataclass(frozen=True)
class Prediction:
    """What a form costs at some sizes: in sum, and of which the step that takes longest."""

    form: str
    flops: float
    bytes: float
    seconds: float
    longest: str

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 2**20:.3g} MiB, {self.seconds * 1e6:.3g} µs"


def chunk_tokens(geometry: MLAGeometry, itemsize: int) -> int:
    """How many tokens of a sequence are expanded at a time: a power of two that keeps a chunk below a GiB."""
    fits = EXPANDED_AT_ONCE // (geometry.expanded_width * itemsize)
    return max(CHUNKS[0], min(CHUNKS[1], 1 << max(fits.bit_length() - 1, 0)))


@cache
def _compiled(form: str, masked: bool) -> Callable[..., list[list[float]]]:
    """FLOPs, bytes, launches and waste of every step, as one Python function of ``forms.SYMBOLS``."""
    rows = [[step.flops, step.bytes, step.launches, step.waste] for step in forms.steps(form, masked=masked)]
    return sympy.lambdify(forms.SYMBOLS, rows, modules="math", cse=True)  # type: ignore[no-any-return]


def predict(
    form: str,
    geometry: MLAGeometry,
    *,
    batch: int,
    queries: int,
    context: int,
    dtype: str,
    hardware: Hardware,
    masked: bool = False,
    chunk: int | None = None,
) -> Prediction:
    """The cost of one attention, its products with the up-projections included.

    Args:
        form: "absorbed", "expanded" or "chunked". queries, context: tokens; the queries are the last of the context.
        dtype: of weights, cache and activations. masked: every pair is computed, under a mask in memory.
        chunk: tokens expanded at a time; None: what ``chunk_tokens`` says.
    """
    g, size = geometry, _BYTES.get(dtype, 2)
    chunk = chunk_tokens(g, size) if chunk is None else chunk
    sizes = (batch, queries, max(context, queries), g.heads, g.rank, g.nope, g.rope, g.v, size, size, size, chunk)
    found = forms.steps(form, masked=masked)
    rows = _compiled(form, masked)(*sizes, hardware.tile, hardware.units)
    times = [
        max(
            flops * waste / hardware.rate(step.kind, dtype),
            moved / hardware.copies(step.kind),
        )
        + launches * hardware.latency
        for step, (flops, moved, launches, waste) in zip(found, rows, strict=True)
    ]
    longest = found[max(range(len(times)), key=times.__getitem__)].name
    return Prediction(form, float(sum(r[0] for r in rows)), float(sum(r[1] for r in rows)), float(sum(times)), longest)


def cheapest(predictions: list[Prediction]) -> Prediction:
    """The fastest of some; the first of equals."""
    return min(predictions, key=lambda p: p.seconds)
