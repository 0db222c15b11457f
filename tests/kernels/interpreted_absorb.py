"""Runs ``absorb_and_write`` in Triton's interpreter; a process of its own. One line a failure."""

from __future__ import annotations

import torch

import tests.kernels.interpreted_fp8_linear
import tests.kernels.interpreted_write  # noqa: F401  (both set the mode and mend the interpreter)
from mlacompile.kernels.absorb_and_write.supports import triton_reasons
from mlacompile.testing.absorbed import AbsorbCase, make_absorbed, wrong_in

CASES = (
    AbsorbCase(1, 3, 192, 128, 16, "token", torch.float16),
    AbsorbCase(17, 5, 256, 64, 16, "block", torch.float16),
    AbsorbCase(2, 2, 64, 128, 16, "static", torch.float16),
)


def main() -> None:
    for case in CASES:
        made = make_absorbed(case)
        if reasons := triton_reasons(*made.arguments, **made.settings):
            print(f"{case}: unsupported: {reasons}")
        elif wrong := wrong_in(case, impl="triton"):
            print(f"{case}: {wrong}")


if __name__ == "__main__":
    main()
