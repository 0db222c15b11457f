"""Two pictures of one attention: where its forms stand under the roofline, and where one overtakes the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlacompile.cost.border import border, flops_border_of
from mlacompile.cost.hardware import Hardware
from mlacompile.cost.predict import predict
from mlacompile.errors import MLACompileError
from mlacompile.geometry import MLAGeometry

_FORMS = ("absorbed", "expanded", "chunked")
_QUERIES = tuple(2**i for i in range(13))  # 1 … 4096


def draw(
    geometry: MLAGeometry, target: Path, *, batch: int, contexts: Sequence[int], dtype: str, hardware: Hardware
) -> None:
    """Write a PNG: the roofline with both forms at 1 to 4096 queries, and time over queries for each context.

    Raises:
        MLACompileError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MLACompileError("a plot needs matplotlib, which is not installed: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 1 + len(contexts), figsize=(4.6 * (1 + len(contexts)), 4), squeeze=False)
    _roofline(panels[0][0], geometry, batch, max(contexts), dtype, hardware)
    for axes, context in zip(panels[0][1:], contexts, strict=True):
        _crossover(axes, geometry, batch, context, dtype, hardware)
    figure.suptitle(f"{geometry}; {batch} sequences, {dtype}; {hardware.name} ({hardware.source})", fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _roofline(axes: Any, geometry: MLAGeometry, batch: int, context: int, dtype: str, hardware: Hardware) -> None:
    peak, bandwidth = hardware.rate("matmul", dtype), hardware.bandwidth
    ridge = peak / bandwidth
    reach = [ridge / 1000, ridge, ridge * 100]
    axes.plot(reach, [min(peak, bandwidth * i) / 1e12 for i in reach], color="black", linewidth=1)
    for form, marker in zip(_FORMS[:2], "os", strict=True):
        points = [_at(form, geometry, batch, q, context, dtype, hardware) for q in _QUERIES if q <= context]
        intensity, rate = [p.flops / p.bytes for p in points], [p.flops / p.seconds / 1e12 for p in points]
        axes.plot(
            intensity, rate, marker + "-", markersize=3, linewidth=0.7, label=f"{form}, 1 … {_QUERIES[-1]} queries"
        )
        axes.annotate("1", (intensity[0], rate[0]), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s", title=f"roofline, context {context}")
    axes.legend(fontsize=7)


def _crossover(axes: Any, geometry: MLAGeometry, batch: int, context: int, dtype: str, hardware: Hardware) -> None:
    queries = [q for q in _QUERIES if q <= context]
    for form in _FORMS:
        times = [_at(form, geometry, batch, q, context, dtype, hardware).seconds * 1e6 for q in queries]
        axes.plot(queries, times, label=form)
    at = border(geometry, batch, context, dtype, hardware, "chunked")
    if 1 <= at <= context:
        axes.axvline(at, color="red", linewidth=0.8, label=f"border: {at} queries")
    by_flops = flops_border_of(geometry, context)
    if by_flops <= context:
        axes.axvline(by_flops, color="grey", linewidth=0.8, linestyle=":", label=f"FLOPs alone: {by_flops:.0f}")
    axes.set(xscale="log", yscale="log", xlabel="queries", ylabel="µs", title=f"context {context}")
    axes.legend(fontsize=7)


def _at(form: str, g: MLAGeometry, batch: int, queries: int, context: int, dtype: str, hardware: Hardware) -> Any:
    return predict(form, g, batch=batch, queries=queries, context=context, dtype=dtype, hardware=hardware)
