"""Runs ``quantize_rows`` in Triton's interpreter; a process of its own. One line a failure."""

from __future__ import annotations

import interpreted  # noqa: F401  (sets the mode)
import interpreted_write  # noqa: F401  (casts to FP8 as a GPU does)
import torch

from mlacompile.kernels import parts
from mlacompile.kernels.quantize_rows import launch, portable
from mlacompile.kernels.quantize_rows.launch import quantize_rows_triton
from mlacompile.kernels.quantize_rows.supports import triton_reasons
from mlacompile.ops.quantize_rows import quantize_rows_reference
from mlacompile.testing.quantized_rows import FORMS, make_rows, worst_rows
from tests.kernels.spoilt import spoil


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


def drops_what_it_is_told() -> None:
    """All of what is spent, nothing beside it, and not before it has been read."""
    portable._drop = parts._drop = spoil
    launch.in_whole_lines = lambda t: True
    for form in FORMS:
        for m, k in ((3, 256), (2, 2176)):
            rows = make_rows(m, k, form, dtype=torch.float32)
            before = make_rows(m, k, form, dtype=torch.float32)
            done = torch.zeros(5, 96)
            results = quantize_rows_triton(*rows.tensors, done, **rows.settings, spent=True)
            if wrong := worst_rows(before, results):
                print(f"{form} {m} {k}: {wrong}")
            for name, now, was in zip(("x", "added", "norm", "gated"), rows.tensors, before.tensors, strict=True):
                if now is None or was is None:
                    continue
                spoilt, beside = int(now.isnan().sum()), now._base if now._base is not None else now
                left = was._base if was._base is not None else was
                kept = int((beside.isnan() ^ left.isnan()).sum()) - spoilt
                if kept or spoilt != (now.numel() if name in ("x", "gated") else 0):
                    print(f"{form} {m} {k}: of {name} {spoilt} of {now.numel()} values dropped, {kept} beside it")
            if not done.isnan().all():
                print(f"{form} {m} {k}: {int((~done.isnan()).sum())} values of what is done are left")


if __name__ == "__main__":
    main()
    not_finite()
    drops_what_it_is_told()
