"""Draws results of mla_decode.py under the roof that their run measured: TFLOP/s over FLOPs a byte, a colour a kernel.

    python benchmarks/roofline_plot.py benchmarks/results/mla_decode-nvidia-h100-80gb-hbm3.json

A kernel reads a cache and computes on it, so a point is as high as both its bytes and its products let it be. The
sloping roof is what a copy moves, reads and writes together: reading alone can be faster, and points may lie above it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RANK, ROPE = 512, 64


def flops(record: dict[str, Any]) -> float:
    """Of both products of a record."""
    rows = record["batch"] * record["heads"] * record["queries"]
    return 2.0 * rows * record["context"] * (2 * RANK + ROPE)


def plot(source: Path, target: Path) -> None:
    """Draw the JSON at ``source`` into the PNG at ``target``; says so when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads(source.read_text())
    about, records = found["environment"], found["records"]
    figure, axes = pyplot.subplots(figsize=(9, 6))
    bandwidth, peak = about["copy TB/s"], about["bf16 product TFLOP/s"]
    intensities = [flops(r) / r["bytes"] for r in records]
    low, high = min(intensities) / 2, max(intensities) * 2
    axes.plot([low, peak / bandwidth, high], [low * bandwidth, peak, peak], color="black", linewidth=1)
    for name in dict.fromkeys(r["name"] for r in records):
        mine = [r for r in records if r["name"] == name]
        x, y = [flops(r) / r["bytes"] for r in mine], [flops(r) / r["us"] / 1e6 for r in mine]
        axes.scatter(x, y, s=16, label=name)
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:  # one label a shape and size of token: the fastest
        key = (record["heads"], record["batch"], record["context"], record["queries"], record["ragged"])
        if key not in best or record["us"] < best[key]["us"]:
            best[key] = record
    for (heads, batch, context, queries, ragged), record in best.items():
        label = f"{'ragged ' * ragged}{heads}×{batch}×{context}" + (f"×{queries}" if queries > 1 else "")
        point = flops(record) / record["bytes"], flops(record) / record["us"] / 1e6
        axes.annotate(label, point, fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte of cache, queries and output")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(
        f"mla_decode, heads × batch × context, {about['device']}, commit {about['commit']}\n"
        f"copy {bandwidth:.2f} TB/s, bf16 product {peak:.0f} TFLOP/s, both measured in the run",
        fontsize=9,
    )
    axes.legend(fontsize=7)
    axes.grid(which="major", alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    plot(path, path.with_suffix(".png"))
