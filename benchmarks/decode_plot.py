"""Draws a result of decode_step.py: milliseconds a layer by shape and backend, one panel a model.

python benchmarks/decode_plot.py benchmarks/results/decode_step-cpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


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
    rows = [row for row in found["results"] if row["ms_per_layer"] is not None]
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(1, max(1, len(names)), figsize=(6.5 * max(1, len(names)), 4.5), squeeze=False)
    for axes, name in zip(panels[0], names, strict=False):
        _panel(axes, name, [row for row in rows if row["model"] == name])
    about = found["environment"]
    figure.suptitle(
        f"One decode step, {about['device']}, torch {about['torch']}, transformers {about['transformers']}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, name: str, rows: list[dict[str, Any]]) -> None:
    shapes = list(dict.fromkeys((row["batch"], row["context"]) for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    width = 0.8 / len(backends)
    for i, backend in enumerate(backends):
        mine = [row for row in rows if row["backend"] == backend]
        places = [shapes.index((row["batch"], row["context"])) + (i - (len(backends) - 1) / 2) * width for row in mine]
        heights = [row["ms_per_layer"] for row in mine]
        bars = axes.bar(places, heights, width, label=backend)
        axes.bar_label(bars, [f"{h:.2f}" if h < 10 else f"{h:.0f}" for h in heights], fontsize=7, padding=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), [f"{batch} × {context}" for batch, context in shapes])
    axes.set_xlabel("batch × context")
    axes.set_ylabel("ms a layer")
    axes.set_title(name)
    heights = [row["ms_per_layer"] for row in rows]
    axes.set_ylim(min(heights) / 2, max(heights) * 2)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    plot(path, path.with_suffix(".png"))
