"""``docs/models.md`` says what is so: some cells are measured again, all of them with ``MLACOMPILE_FULL=1``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import transformers

from tests.families import CACHES, FAMILIES, measured

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text().splitlines()
ATTENTIONS = ("sdpa", "eager")
#: Each attention and each cache; a family with other layers as well, and the one that is eager only. ``test_models.py``
#: has all four combinations of attention and cache.
QUICK = [
    ("axk1", "eager", "static"),
    ("kimi_linear", "sdpa", "dynamic"),
    ("hy_v4", "sdpa", "static"),
    ("hy_v4", "eager", "dynamic"),
]
ALL = [(name, attn, cache) for name in FAMILIES for attn in ATTENTIONS for cache in CACHES]
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
@pytest.mark.parametrize(("name", "attn", "cache"), ALL if os.environ.get("MLACOMPILE_FULL") == "1" else QUICK)
def test_a_cell_is_measured_again(name: str, attn: str, cache: str) -> None:
    absorbed, error = measured(name, attn, cache)
    assert error <= 1e-5
    (row,) = ([c.strip() for c in line.split("|")] for line in PAGE if line.startswith(f"| {name} |"))
    assert row[3 + 2 * ATTENTIONS.index(attn) + CACHES.index(cache)] == absorbed
    assert row[2] == str(FAMILIES[name].layers)
    assert row[7] == FAMILIES[name].why
