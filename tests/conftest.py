"""Every test starts with nothing compiled; two test processes on two cores do not fight over threads.

Tracing takes most of the time, and of that a tenth went into collecting garbage over and over and into texts for a log
that nobody reads.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Inductor reads these when it is imported, here and in the processes that tests start. It would compile and load six
# programs to see what this compiler can do, and start a process of its own to compile in beside every test process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# PyTorch prints every graph of every stage for this logger once it has a handler, and pytest gives every logger one.
logging.getLogger("torch.__trace").addHandler = lambda handler: None  # type: ignore[method-assign]


def pytest_collection_finish() -> None:
    """Looking for garbage among all that was imported, every few hundred objects, takes longer than what it frees."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def slow_hardware(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A device on which arithmetic alone takes time, so that forms cross where their FLOPs do, on a few tokens."""
    text = 'base = "cpu"\nname = "a slow one"\nlatency = 1e-12\nbandwidth = 1e18\n'
    text += "[flops]\nfloat32 = 1e9\nbfloat16 = 1e9\n[share]\nheads = 1\nlatent = 1\nmasked = 0.5\n"
    file: Path = tmp_path_factory.mktemp("hardware") / "slow.toml"
    file.write_text(text)
    return str(file)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of compiled kernels: registers, spills, shared memory, instructions, whoever compiled them."""
    reports = [r for key in ("passed", "failed") for r in terminalreporter.stats.get(key, [])]
    tables = [
        text.splitlines() for r in reports for key, text in getattr(r, "user_properties", ()) if key == "compiled"
    ]
    if tables:
        terminalreporter.section("compiled for a GPU that is not there")
        for line in (tables[0][0], *(line for rows in tables for line in rows[1:])):
            terminalreporter.write_line(line)
