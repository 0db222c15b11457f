"""Every test starts with nothing compiled; two test processes on two cores do not fight over threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
