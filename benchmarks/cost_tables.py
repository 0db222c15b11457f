"""The tables of docs/cost.md that are measured: made of the JSON files that crossover.py and prefill.py wrote.

python benchmarks/cost_tables.py            print them
python benchmarks/cost_tables.py --write    put them into docs/cost.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEVICE = "nvidia-h200"
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs" / "cost.md"
BEGIN, END = "<!-- benchmarks/cost_tables.py {} -->\n", "<!-- end of {} -->\n"
NAMES = {"v3": "V3, 128 heads", "v2-lite": "V2-Lite, 16 heads"}


def tables() -> dict[str, str]:
    """Both tables, by name."""
    made = {"crossover": _borders(_read("crossover")), "prefill": _prompts(_read("prefill"))}
    return {name: "\n".join(lines) + "\n" for name, lines in made.items()}


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}-{DEVICE}.json").read_text())  # type: ignore[no-any-return]


def _where(data: dict[str, Any], name: str, *suffixes: str) -> str:
    about = data["environment"]
    links = ", ".join(f"[{s.upper()}](../benchmarks/results/{name}-{DEVICE}.{s})" for s in suffixes)
    versions = f"torch {about['torch']}, Triton {about['triton']}, commit {about['commit']}"
    return f"One {about['device']} ({versions}; {links}):"


def _borders(data: dict[str, Any]) -> Iterator[str]:
    yield _where(data, "crossover", "json", "png")
    yield ""
    yield '| shape | context | predicted | measured | ratio | `form="auto"` over the better form, at worst |'
    yield "|---|--:|--:|--:|--:|--:|"
    for at in data["borders"]:
        cells = (f"{at['predicted']}", f"{at['measured']:.0f}", f"{at['ratio']:.2f}", f"{at['worst_auto']:.3f}")
        yield f"| {NAMES[at['shape']]} | {at['context']} | {' | '.join(cells)} |"


def _prompts(data: dict[str, Any]) -> Iterator[str]:
    yield _where(data, "prefill", "json")
    yield ""
    yield "| shape | cache | stock | mlacompile | | peak memory |"
    yield "|---|---|--:|--:|--:|--:|"
    rows = data["results"]
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        cache = "none" if stock["cache"] == "none" else f"StaticCache of {stock['cache_length']}"
        times = f"{stock['ms']:.2f} ms | {ours['ms']:.2f} ms | {stock['ms'] / ours['ms']:.2f} ×"
        yield f"| {NAMES[stock['model']]} | {cache} | {times} | {stock['peak_gib']:.2f} → {ours['peak_gib']:.2f} GiB |"


def write(text: str) -> str:
    """A page with the tables in their places."""
    for name, table in tables().items():
        before, _, rest = text.partition(BEGIN.format(name))
        text = before + BEGIN.format(name) + table + END.format(name) + rest.partition(END.format(name))[2]
    return text


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/cost.md")
    if parser.parse_args().write:
        DOCS.write_text(write(DOCS.read_text()))
    else:
        print("\n".join(tables().values()))


if __name__ == "__main__":
    main()
