"""Whether W_UV is worth multiplying with the output projection beforehand: a table by the cost model, in docs/cost.md.

after attention      o_latent [R] · W_UV [R, V] · W_O [V, hidden]      a head each, summed over heads
merged               o_latent [R] · (W_UV W_O) [R, hidden]

python benchmarks/merging.py            print the table
python benchmarks/merging.py --write    put it into docs/cost.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from mlacompile.cost.chains import best_order, merges_below
from mlacompile.cost.hardware import TABLE

#: heads, rank, v, hidden, as the configurations published with the weights say
SHAPES = {
    "DeepSeek-V3, R1": (128, 512, 128, 7168),
    "Kimi-K2": (64, 512, 128, 7168),
    "DeepSeek-V2": (128, 512, 128, 5120),
    "DeepSeek-V2-Lite": (16, 512, 128, 2048),
    "LongCat-Flash": (64, 512, 128, 6144),
    "GLM-4.7-Flash": (20, 512, 256, 2048),
    "MiniCPM3-4B": (40, 256, 64, 2560),
    "SmolLM2-135M, an eighth of its cache": (9, 32, 64, 576),
}
ROWS = (1, 64, 4096)
DOCS = Path(__file__).parent.parent / "docs" / "cost.md"
BEGIN, END = "<!-- benchmarks/merging.py -->\n", "<!-- end -->\n"


def table() -> str:
    """Microseconds on an H200 in bf16: one product after the other, and merged; the cheaper is bold."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "| | heads · rank · v · hidden | pays below rank | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |"
    yield "|---|---|--:|" + "--:|" * len(ROWS)
    for name, (heads, rank, v, hidden) in SHAPES.items():
        cells = []
        for rows in ROWS:
            both = [
                best_order(
                    widths, rows=rows, itemsize=2, dtype="bfloat16", hardware=TABLE["h200"], heads=heads,
                    allow_merge=False,
                ).seconds
                for widths in ((rank, v, hidden), (rank, hidden))
            ]  # fmt: skip
            marks = ["**" if seconds == min(both) else "" for seconds in both]
            cells.append(" / ".join(f"{m}{s * 1e6:.3g}{m}" for m, s in zip(marks, both, strict=True)))
        limit = merges_below(v, hidden)
        yield f"| {name} | {heads} · {rank} · {v} · {hidden} | {limit:.0f} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/cost.md")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
