"""Logging, and the dump folder.

The logger is called like the package, so ``TORCH_LOGS="mlacompile"`` shows every decision and
``TORCH_LOGS="+mlacompile"`` the time of each
stage too, as for torch's own components. With the option ``dump=FOLDER`` the graph after every stage is written
there as readable Python, with shapes and source lines.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch.fx import GraphModule

log = logging.getLogger("mlacompile")


def dump_graph(folder: str | Path | None, name: str, stage: str, gm: GraphModule) -> None:
    """Write a graph as Python into ``folder/name/stage.py``; nothing when no folder was given."""
    if folder is None:
        return
    place = Path(folder) / name
    place.mkdir(parents=True, exist_ok=True)
    text = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    (place / f"{stage}.py").write_text(text.replace("class <lambda>(", "class Graph("))
