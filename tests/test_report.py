"""The report: counts, merging, the journal of frames, and the text, JSON and HTML that a person or a program reads."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from mlacompile import MLAGeometry, Report
from mlacompile.report import Journal, Site

GEOMETRY = MLAGeometry(heads=4, rank=64, nope=32, rope=16, v=24)
ABSORBED = Site(
    "absorbed", "1 query tokens", "a.py:3", GEOMETRY, "absorbed", "cpu", GEOMETRY.layout("bfloat16", 2), "1", "s0 + 1"
)
REFUSED = Site("refused", "a mask <b>&</b> more", "b.py:7", queries="1", context="40")
EXPANDED = Site("expanded", "9 query tokens", "a.py:3", GEOMETRY, queries="9", context="9")

SITES = st.builds(
    Site,
    status=st.sampled_from(["absorbed", "expanded", "refused"]),
    reason=st.text(max_size=30),
    source=st.text(max_size=10),
    geometry=st.none() | st.just(GEOMETRY),
    kv_layout=st.none() | st.just(GEOMETRY.layout("float32", 4)),
    queries=st.sampled_from(["", "1", "s0"]),
    context=st.sampled_from(["", "40"]),
)
REPORTS = st.builds(
    Report,
    sites=st.lists(SITES, max_size=4).map(tuple),
    notes=st.lists(st.text(max_size=8), max_size=2, unique=True).map(tuple),
    seconds=st.dictionaries(st.sampled_from(["recognize", "lower"]), st.floats(0, 1e3)),
)


class Cells(HTMLParser):
    """Reads an HTML table back into rows of text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        self.inside = tag == "td"

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_counts_and_summary() -> None:
    report = Report((ABSORBED, REFUSED, ABSORBED, EXPANDED))
    assert (report.absorbed, report.expanded, report.refused) == (2, 1, 1)
    assert report.summary() == "2 absorbed, 1 expanded, 1 refused"


@given(st.lists(REPORTS, max_size=4))
@settings(deadline=None)
def test_merging_loses_nothing(reports: list[Report]) -> None:
    merged = Report.merge(reports)
    assert merged.sites == tuple(site for r in reports for site in r.sites)
    assert list(merged.notes) == list(dict.fromkeys(note for r in reports for note in r.notes))
    for stage, spent in merged.seconds.items():
        assert spent == sum(r.seconds.get(stage, 0.0) for r in reports)
    assert Report.merge([merged]) == merged


@given(REPORTS)
@settings(deadline=None)
def test_json_says_everything(report: Report) -> None:
    data = json.loads(report.to_json())
    assert (data["absorbed"], data["expanded"], data["refused"]) == (report.absorbed, report.expanded, report.refused)
    assert data["notes"] == list(report.notes)
    for site, plain in zip(report.sites, data["sites"], strict=True):
        assert plain["status"] == site.status
        assert plain["reason"] == site.reason
        assert plain["geometry"] == (None if site.geometry is None else site.geometry.to_dict())


def test_equal_sites_share_a_row_in_text_and_html() -> None:
    report = Report((ABSORBED, REFUSED, ABSORBED), ("a note",))
    text = str(report)
    assert "1 refused" in text
    assert "4 heads, rank 64" in " ".join(text.split())
    assert text.count("a.py:3") == 1
    assert "note: a note" in text
    _, first, second = Cells(report.to_html()).rows
    assert first[:2] == ["2", "absorbed"]
    assert second[:2] == ["1", "refused"]
    assert "a mask <b>&</b> more" in second, "text from a model is shown, not interpreted"
    assert "1 × s0 + 1" in first
    assert f"bfloat16, {2 * (64 + 16)} B/token" in first


def test_an_empty_report_can_be_shown() -> None:
    assert "0 absorbed, 0 expanded, 0 refused" in str(Report())
    assert "0 absorbed" in Report().to_html()


def test_long_reasons_are_shown_whole() -> None:
    reason = " ".join(f"word{i}" for i in range(60))
    shown = "".join(str(Report((replace(REFUSED, reason=reason),))).split())
    assert all(f"word{i}" in shown for i in range(60))


def test_the_journal_keeps_the_latest_compilation_of_every_frame() -> None:
    journal = Journal()
    journal.add("frame 0", 0, Report((EXPANDED,)))
    journal.add("frame 1", 0, Report((REFUSED,)))
    journal.add("frame 0", 1, Report((ABSORBED,)))
    journal.add("frame 0", 1, Report((ABSORBED,)))  # behind a graph break of the same compilation
    assert journal.merged().sites == (REFUSED, ABSORBED, ABSORBED)
    journal.clear()
    assert journal.merged() == Report()


def test_the_journal_is_safe_to_use_from_many_threads() -> None:
    journal = Journal()
    barrier = threading.Barrier(8)
    counts: list[int] = []

    def work(frame: int) -> None:
        barrier.wait()
        for compilation in range(200):
            journal.add(frame, compilation, Report((ABSORBED,)))
            counts.append(journal.merged().absorbed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 8 * 200
    assert max(counts) <= journal.merged().absorbed == 8
