"""Runs the Triton kernel of ``fp8_experts`` in Triton's interpreter; a process of its own, whose import sets the mode.

Usage: python -m tests.kernels.interpreted_fp8_experts. Prints one line a failure.
"""

from __future__ import annotations

import torch

import tests.kernels.interpreted_fp8_linear  # noqa: F401  (sets the mode, and mends what NumPy refuses)
from mlacompile.testing.experts import SHAPES, disagreement, disorder

if __name__ == "__main__":
    torch.set_num_threads(1)
    for shape, kind in zip(SHAPES, ("outliers", "plain", "tiny", "zeros", "plain"), strict=True):
        if wrong := disagreement(*shape, kind=kind, dtype=torch.float32):
            print(f"{shape} {kind}: {wrong}")
    for rows, experts, dtype in (
        (1, 1, torch.int32),
        (8, 256, torch.int64),
        (300, 31, torch.int32),
        (129, 64, torch.int64),
    ):
        if wrong := disorder(rows, experts, dtype):
            print(wrong)
    print("ran")
