"""Writes the table and the plot of docs/convert.md from the committed losses, so that no figure is ever typed.

python benchmarks/convert_table.py          rewrites what is between the two markers, and the plot
python benchmarks/convert_table.py --check  exits with 1 if the page says something else
python benchmarks/convert_table.py --take RESULT ...   first takes the runs of these parts of a measurement over

The report of a healed conversion, its conversion.json, goes to results/convert_heal-<budget>-<device>.json; that of
one whose time counts, made with nothing else running, to results/convert_time-<effort>-<device>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "convert_loss-cpu.json"
PLOT = RESULT.with_suffix(".png")
PAGE = HERE.parent / "docs" / "convert.md"
BEGIN = "<!-- losses: written by benchmarks/convert_table.py from benchmarks/results -->"
END = "<!-- end of losses -->"
BUDGETS = ("50 %", "68.75 %", "87.5 %")
TEXTS = ("wiki_test.txt", "lee.txt")
KINDS = {
    "baseline": ("TransMLA", "#888888"),
    "fast": ("mlacompile", "#f58518"),
    "ours": ("mlacompile --effort full", "#4c78a8"),
}
_MISSING = "not measured"


def main() -> int:
    """Rewrite or check the page."""
    result = json.loads(RESULT.read_text())
    if sys.argv[1:2] == ["--take"]:
        for part in sys.argv[2:]:
            result = take(result, json.loads(Path(part).read_text()))
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    old = PAGE.read_text()
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} lacks the markers {BEGIN!r} and {END!r}")
    new = f"{head}{BEGIN}\n{losses(result)}\n\n{times()}\n\n{healed()}\n\n{ablations(result)}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if new != old:
            print(f"{PAGE.name} does not say what {RESULT.name} does: run benchmarks/convert_table.py")
        return int(new != old)
    PAGE.write_text(new)
    plot(result)
    return 0


def take(result: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """``result`` with the runs of ``part``, evaluated on the same texts; each run says how it was made.

    What a run was not measured for again stays, such as what another reading of the baseline gave.
    """
    if result["evaluation"] != part["evaluation"]:
        raise ValueError(f"got a part evaluated on {part['evaluation']}; expected {result['evaluation']}")
    how = {name: part[name] for name in ("environment", "calibration")}
    rows = {name: result["runs"].get(name, {}) | row | how for name, row in part["runs"].items()}
    return result | {"runs": result["runs"] | rows}


def _figure(row: dict[str, Any] | None, text: str, name: str) -> str:
    return _MISSING if row is None or text not in row else f"{row[text][name]:.2f}"


def losses(result: dict[str, Any]) -> str:
    """Perplexities of the baseline and ours at every budget, in Markdown."""
    runs = result["runs"]
    lines = [
        "| cache saved | method | rope + latent | " + " | ".join(f"{t}, perplexity | KL" for t in TEXTS) + " |",
        "|---|---|---|" + "--:|--:|" * len(TEXTS),
    ]
    originals = [_figure(next((r for r in runs.values() if t in r), None), t, "original") for t in TEXTS]
    lines.append("| 0 % | original | | " + " | ".join(f"{original} | 0" for original in originals) + " |")
    for budget in BUDGETS:
        for kind, (name, _) in KINDS.items():
            says = name if kind == "baseline" else f"**{name}**"
            row = runs.get(f"{kind} {budget}")
            widths = _MISSING if row is None else f"{row['rope_dim']} + {row['rank']}"
            if row is not None and "fold" in row:
                says += f", fold {row['fold']}"
            cells = [_figure(row, text, name) for text in TEXTS for name in ("perplexity", "kl")]
            lines.append(f"| {budget} | {says} | {widths} | " + " | ".join(cells) + " |")
    folds = [f"{b}: {_by_fold(runs[f'baseline {b}'])}" for b in BUDGETS if "by_fold" in runs.get(f"baseline {b}", {})]
    if folds:
        lines.append(f"\nTransMLA calibrated once, on the original alone, by fold, {TEXTS[0]}: {'; '.join(folds)}.")
    if whole := runs.get("baseline nothing truncated"):
        widths, figure = f"{whole['rope_dim']} + {whole['rank']}", _figure(whole, TEXTS[0], "perplexity")
        lines.append(f"\nTransMLA with nothing truncated ({widths}), {TEXTS[0]}: {figure}.")
    return "\n".join(lines)


def _by_fold(row: dict[str, Any]) -> str:
    return ", ".join(f"{fold} gives {perplexity:.2f}" for fold, perplexity in row["by_fold"].items())


def times() -> str:
    """How long conversions take, from their reports."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULT.parent.glob("convert_time-*.json"))]
    if not reports:
        return "How long conversions take has not been measured."
    lines = [
        "| effort | cache saved | on | seconds | CPU seconds | perplexity, validation part | KL |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for report in reports:
        loss, saved = report["losses"][0], f"{100 * (1 - report['cache']['kept']):g} %"
        figures = f"{report['seconds']:.0f} | {report['cpu_seconds']:.0f}"
        lost = f"{loss['perplexity']['source']:.2f} → {loss['perplexity']['result']:.2f} | {loss['kl']:.2f}"
        lines.append(
            f"| {report['options']['effort']} | {saved} | {report['threads']} threads of a CPU | {figures} | {lost} |"
        )
    return "\n".join(lines)


def healed() -> str:
    """What healing made of it, from the reports of conversions."""
    reports = {path: json.loads(path.read_text()) for path in sorted(RESULT.parent.glob("convert_heal-*.json"))}
    if not reports:
        return "Healed models have not been measured on a GPU yet."
    lines = [
        "| healed | on | steps | " + " | ".join(f"{text}, perplexity | KL" for text in TEXTS) + " |",
        "|---|---|--:|" + "--:|--:|" * len(TEXTS),
    ]
    for path, report in sorted(reports.items(), key=lambda item: -item[1]["cache"]["kept"]):
        losses = {loss["text"]: loss for loss in report["losses"]}
        cells = [f"{losses[text]['perplexity']['result']:.2f} | {losses[text]['kl']:.2f}" for text in TEXTS]
        saved, device = f"{100 * (1 - report['cache']['kept']):g} % saved", path.stem.split("-", 2)[2]
        asked = f"{report['options']['heal']:g} minutes" if "heal" in report["options"] else ""
        lines.append(f"| {saved} | {device} {asked} | {report['healing']['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablations(result: dict[str, Any]) -> str:
    """Ours at half the cache, with each idea switched off."""
    known = {name: row for name, row in result["runs"].items() if name.split()[0] not in KINDS}
    if not known:
        return "The ablations have not been measured yet: `benchmarks/convert_loss.py` runs them."
    lines = ["| switched off, at 50 % | instead | " + " | ".join(TEXTS) + " |", "|---|---|" + "--:|" * len(TEXTS)]
    for name, row in {"nothing": result["runs"].get("ours 50 %"), **known}.items():
        cells = " | ".join(_figure(row, text, "perplexity") for text in TEXTS)
        lines.append(f"| {name} | {(row or {}).get('says', '')} | {cells} |")
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> None:
    """Perplexity against what is saved, baseline and ours, a panel a text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        for axes, text in zip(figure.subplots(1, len(TEXTS)), TEXTS):
            for kind, (label, color) in KINDS.items():
                rows = {b: result["runs"].get(f"{kind} {b}", {}).get(text) for b in BUDGETS}
                points = [(float(b.split()[0]), row["perplexity"]) for b, row in rows.items() if row is not None]
                if points:
                    axes.plot(*zip(*points), marker="o", label=label, color=color)
            axes.set(title=text, xlabel="cache saved, %", ylabel="perplexity", yscale="log")
            axes.legend(frameon=False)
        figure.savefig(PLOT, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
