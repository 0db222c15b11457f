"""Writes the README's table of decode steps from the committed results, so that no figure is ever typed.

python benchmarks/readme_table.py          rewrites the table between its two markers
python benchmarks/readme_table.py --check  exits with 1 if the README says something else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN = "<!-- decode steps: written by benchmarks/readme_table.py from benchmarks/results -->"
END = "<!-- end of decode steps -->"

#: Where each section's figures come from, and the cells it has, measured yet or not.
SECTIONS = {
    "decode_step-nvidia-h200.json": (
        ("v3", ("1x1024", "1x8192", "16x8192", "64x8192")),
        ("v2-lite", ("1x1024", "1x8192", "16x8192", "64x8192")),
    ),
    "decode_step-cpu.json": (("cpu", ("1x4096",)),),
}
NAMES = {
    "v3": "V3 (128 heads, hidden 7168)",
    "v2-lite": "V2-Lite (16 heads, hidden 2048)",
    "cpu": "16 heads, hidden 1024, float32, on the CPU",
}
COLUMNS = ("eager", "default", "reduce-overhead", "mlacompile")


def main() -> int:
    """Rewrite or check the README next to the benchmarks folder."""
    readme = HERE.parent / "README.md"
    old = readme.read_text()
    new = replace(old, table(HERE / "results"))
    if "--check" in sys.argv[1:]:
        if new != old:
            print("README.md does not say what benchmarks/results does: run benchmarks/readme_table.py")
        return int(new != old)
    readme.write_text(new)
    return 0


def replace(readme: str, text: str) -> str:
    """The README with ``text`` between its markers."""
    head, found_begin, rest = readme.partition(BEGIN)
    _, found_end, tail = rest.partition(END)
    if not (found_begin and found_end):
        raise ValueError(f"README.md lacks the markers {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def table(results: Path) -> str:
    """The table in Markdown; a cell that was not measured yet says so by a dash."""
    lines = [
        "| model | batch × context | eager | torch.compile | reduce-overhead "
        "| **mlacompile** | speedup | memory (stock) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    sources = []
    for file, sections in SECTIONS.items():
        found = json.loads((results / file).read_text()) if (results / file).is_file() else None
        rows = (
            {}
            if found is None
            else {(r["model"], f"{r['batch']}x{r['context']}", r["backend"]): r for r in found["results"]}
        )
        for model, shapes in sections:
            lines += [_row(rows, model, shape, first=shape == shapes[0]) for shape in shapes]
        if found is not None:
            sources.append(_source(found["environment"], found["settings"]))
    note = "Speedup: against the best stock figure of the same run. –: not measured yet."
    return "\n".join([*lines, "", *sources, note])


def _row(rows: dict[tuple[str, str, str], dict[str, Any]], model: str, shape: str, *, first: bool) -> str:
    cells = [rows.get((model, shape, backend), {}) for backend in COLUMNS]
    times = [cell.get("ms_per_layer") for cell in cells]
    stock = [time for time in times[1:3] if time is not None]
    speedup = f"**{min(stock) / times[3]:.1f} ×**" if times[3] and stock else "–"
    memory = "–"
    if cells[3].get("peak_gib"):
        theirs = [c["peak_gib"] for c in cells[1:3] if c.get("peak_gib")]
        memory = f"{cells[3]['peak_gib']:.1f} GiB" + (f" ({min(theirs):.1f})" if theirs else "")
    label = NAMES[model] if first else ""
    return f"| {label} | {shape.replace('x', ' × ')} | {' | '.join(map(_ms, times))} | {speedup} | {memory} |"


def _ms(time: float | None) -> str:
    if time is None:
        return "–"
    return f"{time:.2f}" if time < 10 else f"{time:.1f}"


def _source(about: dict[str, Any], settings: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "transformers") if about.get(name))
    what = f"{settings['layers']} layers, {settings['dtype']}, {settings['cache']}"
    note = f" {about['note'][0].upper()}{about['note'][1:]}." if about.get("note") else ""
    return f"{about['device']}: {what}; {versions}; commit {about['commit']}.{note}\n"


if __name__ == "__main__":
    sys.exit(main())
