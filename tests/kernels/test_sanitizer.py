"""compute-sanitizer over small shapes: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, of the CUDA toolkit, on the path"),
]


@pytest.mark.parametrize(
    ("tool", "clean"), [("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "RACECHECK SUMMARY: 0 hazards")]
)
def test_small_shapes(tool: str, clean: str) -> None:
    assert SANITIZER is not None
    # Memory that PyTorch keeps back would hide what lies beyond a tensor.
    settings = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, "--tool", tool, sys.executable, "-m", "tests.kernels.small_shapes"]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ran" in done.stdout
    assert clean in done.stdout, "\n".join(dict.fromkeys(_findings(done.stdout)))


def _findings(report: str) -> list[str]:
    """What was found, with where both accesses stand, and which kernel had run by then."""
    told = ("Error:", "Warning:", " and ", " at ", "SUMMARY", "ran")
    return [line.removeprefix("=========").strip() for line in report.splitlines() if any(x in line for x in told)]
