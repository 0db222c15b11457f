"""Runs ``quantize_rows`` in Triton's interpreter; a process of its own. One line a failure."""

from __future__ import annotations

import interpreted  # noqa: F401  (sets the mode)
import interpreted_write  # noqa: F401  (casts to FP8 as a GPU does)
import torch

from mlacompile.kernels.quantize_rows.launch import quantize_rows_triton
from mlacompile.kernels.quantize_rows.supports import triton_reasons
from mlacompile.ops.quantize_rows import quantize_rows_reference
from mlacompile.testing.quantized_rows import FORMS, make_rows, worst_rows


def main() -> None:
    for i, form in enumerate(FORMS):
        for j, (m, k) in enumerate(((3, 256), (2, 1536), (1, 200), (2, 2176))):
            if form == "heads" and k % 128:
                continue
            rows = make_rows(m, k, form, kind=("plain", "outliers", "zeros")[(i + j) % 3], dtype=torch.float32)
            if reasons := triton_reasons(*rows.tensors, **rows.settings):
                print(f"{form} {m} {k}: unsupported: {reasons}")
            elif wrong := worst_rows(rows, quantize_rows_triton(*rows.tensors, **rows.settings)):
                print(f"{form} {m} {k}: {wrong}")


def not_finite() -> None:
    """Groups with an infinity or a NaN are NaN, all of them, and no others."""
    for value in (torch.inf, torch.nan):
        rows = make_rows(2, 512, "plain", dtype=torch.float32)
        rows.tensors[0][1, 300] = value
        (_, descale), (_, want) = (
            run(*rows.tensors, **rows.settings) for run in (quantize_rows_triton, quantize_rows_reference)
        )
        if descale.isnan().nonzero().tolist() != [[1, 2]] or want.isnan().nonzero().tolist() != [[1, 2]]:
            print(f"{value}: {descale}")


if __name__ == "__main__":
    main()
    not_finite()
