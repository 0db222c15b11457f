"""What was rewritten, what was not, and why: the answer to "why did nothing fuse?"."""

from __future__ import annotations

import html
import io
import json
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mlacompile.geometry import KVLayout, MLAGeometry

_COLOURS = {"absorbed": "green", "expanded": "cyan", "refused": "yellow"}


@dataclass(frozen=True)
class Site:
    """One attention op that was found.

    status: "absorbed" (decodes on the latent), "expanded" (recognised, left in expanded form) or "refused" (not
    rewritten). reason: why it has this status, in words a user can act on. source: file:line in the user's model.
    kernel: what computes it. queries, context: tokens as text, symbolic where they vary. sees: which tokens a query
    sees, in words.
    flops, bytes, seconds: what one call is predicted to cost on ``hardware``, in this form; instead: other forms and
    their seconds. None and empty where nothing was predicted. seed: of the random data that the rewrite was checked on.
    """

    status: str
    reason: str
    source: str
    geometry: MLAGeometry | None = None
    form: str = "expanded"
    kernel: str = "as before"
    kv_layout: KVLayout | None = None
    queries: str = ""
    context: str = ""
    sees: str = ""
    flops: float | None = None
    bytes: float | None = None
    seconds: float | None = None
    hardware: str = ""
    instead: tuple[tuple[str, float], ...] = ()
    seed: int | None = field(default=None, compare=False)

    def predicted(self) -> str:
        """FLOPs, bytes and time of one call in a line, and what the other forms would take; "" when not predicted."""
        if self.flops is None or self.bytes is None or self.seconds is None:
            return ""
        others = "".join(f"; {form} {duration(seconds)}" for form, seconds in self.instead)
        sizes = f"{_short(self.flops / 1e9)} GFLOP, {_short(self.bytes / 2**20)} MiB"
        return f"{duration(self.seconds)} on {self.hardware} ({sizes}){others}"


def _short(value: float) -> str:
    """Three digits or all before the point, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time as people write it: 12.3 µs, 4.56 ms, 1.2 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


@dataclass(frozen=True)
class Product:
    """One product with a weight that FP8 was asked for.

    where: the path of its module; source: file:line. shape: rows and columns of the weight, [N, K], or [H, N, K] with a
    weight for every head. left: why it stayed as it was, None when it is in FP8. inputs: positions of its weights among
    the inputs of the graph.
    """

    where: str
    source: str
    shape: tuple[int, ...]
    left: str | None
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """All attention ops of one compilation (or of several, merged), and remarks on the whole graph.

    seconds: time of each stage. notes: what a user should know beyond single sites. products: what became of every
    product with a weight, where FP8 was asked for.
    """

    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    products: tuple[Product, ...] = ()

    def _count(self, status: str) -> int:
        return sum(site.status == status for site in self.sites)

    @property
    def absorbed(self) -> int:
        """How many attention ops decode on the latent."""
        return self._count("absorbed")

    @property
    def expanded(self) -> int:
        """How many were recognised and left in expanded form."""
        return self._count("expanded")

    @property
    def refused(self) -> int:
        """How many were found and left as they were."""
        return self._count("refused")

    @classmethod
    def merge(cls, reports: Iterable[Report]) -> Report:
        """One report out of several, in order; equal notes once, times added."""
        sites: list[Site] = []
        notes: dict[str, None] = {}
        seconds: dict[str, float] = {}
        products: list[Product] = []
        for report in reports:
            sites += report.sites
            products += report.products
            notes |= dict.fromkeys(report.notes)
            for stage, time in report.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + time
        return cls(tuple(sites), tuple(notes), seconds, tuple(products))

    def summary(self) -> str:
        """The counts in one line."""
        return f"{self.absorbed} absorbed, {self.expanded} expanded, {self.refused} refused"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        counts = {"absorbed": self.absorbed, "expanded": self.expanded, "refused": self.refused}
        lists = {"sites": [asdict(s) for s in self.sites], "products": [asdict(p) for p in self.products]}
        return counts | lists | {"notes": list(self.notes), "seconds": self.seconds}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self) -> str:
        """A table that stands alone in a browser."""
        head = "".join(f"<th>{h}</th>" for h in _HEADINGS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
            for cells in _grouped_rows(self.sites)
        )
        notes = "".join(f"<p>{html.escape(n)}</p>" for n in self.notes)
        style = (
            "body{font-family:sans-serif}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .6em}"
        )
        return (
            f"<!doctype html><meta charset=utf-8><title>mlacompile report</title><style>{style}</style>"
            f"<h1>{html.escape(self.summary())}</h1><table><tr>{head}</tr>{rows}</table>{notes}"
        )

    def render(self) -> Any:
        """A rich renderable: a paragraph for each run of equal sites."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"mlacompile: {self.summary()}", title_justify="left", show_header=False, show_lines=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for cells in _grouped_rows(self.sites):
            lines = [(name, cell) for name, cell in zip(_HEADINGS[2:], cells[2:], strict=True) if cell]
            grid = Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            for name, cell in lines:
                grid.add_row(Text(name, style="dim"), Text(cell))
            table.add_row(Text(f"{cells[0]} {cells[1]}", style=_COLOURS.get(cells[1], "")), grid)
        return Group(table, *(Text(f"note: {n}") for n in self.notes))

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=140, no_color=True).print(self.render())
        return out.getvalue()


_HEADINGS = ("ops", "status", "found at", "attention", "tokens", "form", "kernel", "cache", "predicted", "why")


def _grouped_rows(sites: Iterable[Site]) -> list[tuple[str, ...]]:
    """Rows of text; sites that are alike in everything (layers of one model) share a row and are counted."""
    groups: dict[Site, int] = {}
    for site in sites:
        groups[site] = groups.get(site, 0) + 1
    return [
        (
            str(n),
            s.status,
            s.source,
            str(s.geometry or "not latent attention"),
            (f"{s.queries} × {s.context}" if s.queries else "") + (f", {s.sees}" if s.sees else ""),
            s.form,
            s.kernel,
            str(s.kv_layout or ""),
            s.predicted(),
            s.reason,
        )
        for s, n in groups.items()
    ]


class Journal:
    """Reports of everything compiled since the last ``torch._dynamo.reset()``; safe to use from several threads.

    A frame compiled again replaces its earlier report; the graphs between the breaks of one compilation add up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: dict[Any, tuple[Any, list[Report]]] = {}

    def add(self, frame: Any, compilation: Any, report: Report) -> None:
        """Record the report of one graph of one compilation of one frame."""
        with self._lock:
            latest, reports = self._frames.pop(frame, (None, []))
            self._frames[frame] = (compilation, [*reports, report] if latest == compilation else [report])

    def merged(self) -> Report:
        """All frames' latest compilations as one report."""
        with self._lock:
            return Report.merge(r for _, reports in self._frames.values() for r in reports)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._frames.clear()


JOURNAL = Journal()


def last_report() -> Report:
    """What mlacompile did since ``torch._dynamo.reset()``: every compiled frame's latest compilation, merged."""
    return JOURNAL.merged()
