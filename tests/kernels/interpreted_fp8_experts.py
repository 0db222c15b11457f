"""Runs the Triton kernel of ``fp8_experts`` in Triton's interpreter; a process of its own, whose import sets the mode.

Usage: python -m tests.kernels.interpreted_fp8_experts. Prints one line a failure.
"""

from __future__ import annotations

import torch

import tests.kernels.interpreted_fp8_linear  # noqa: F401  (sets the mode, and mends what NumPy refuses)
from mlacompile.testing.experts import SHAPES, disagreement

if __name__ == "__main__":
    torch.set_num_threads(1)
    for shape, kind in zip(SHAPES, ("outliers", "plain", "tiny", "zeros", "plain"), strict=True):
        if wrong := disagreement(*shape, kind=kind, dtype=torch.float32):
            print(f"{shape} {kind}: {wrong}")
    print("ran")
