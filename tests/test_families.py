"""``docs/models.md`` says what is so: rows are measured again, all of them with ``MLACOMPILE_FULL=1``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import transformers

from tests.families import FAMILIES, row

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text().splitlines()
QUICK = ("axk1", "hy_v4", "kimi_linear")
RELEASE = ".".join(transformers.__version__.split(".")[:2])


def test_every_family_is_on_the_page_and_absorbed() -> None:
    cells_of = [[c.strip() for c in line.split("|")] for line in PAGE if line.startswith("| ")]
    rows = {cells[1]: cells[2:7] for cells in cells_of}
    assert set(FAMILIES) == set(rows) - {"family"}
    for name, family in FAMILIES.items():
        layers, *cells = rows[name]
        assert {layers, *cells} <= {str(family.layers), "not there"}, name


@pytest.mark.skipif(
    f"transformers {RELEASE} " not in "".join(PAGE), reason="the page is of another transformers release"
)
@pytest.mark.parametrize("name", FAMILIES if os.environ.get("MLACOMPILE_FULL") == "1" else QUICK)
def test_a_row_is_measured_again(name: str) -> None:
    assert row(name) in PAGE
