"""The kernel of ``quantize_rows`` without a GPU: in Triton's interpreter, and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlacompile.kernels.quantize_rows.supports import triton_reasons
from mlacompile.testing.quantized_rows import FORMS, make_rows

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

from mlacompile.kernels.quantize_rows.launch import launch
from mlacompile.ops.quantize_rows import empty_results
from mlacompile.testing.sass import compile_for, table


def test_in_the_interpreter() -> None:
    script = Path(__file__).parent / "interpreted_quantize_rows.py"
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(script.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("form", FORMS)
def test_what_it_compiles_to(form: str) -> None:
    rows = make_rows(64, 7168, form)
    tensors = [None if t is None else t.to("meta") for t in rows.tensors]
    x, added = tensors[:2]
    assert x is not None
    results = empty_results(x, added, parts="parts" in form, squares="squares" in form)
    grid, arguments, options = launch(*tensors, results, **rows.settings)  # type: ignore[arg-type]
    assert grid == ((64, 1) if "normed" in form and "squares" not in form else (64, 4))
    from mlacompile.kernels.quantize_rows.portable import _quantize_rows_kernel

    built = compile_for(_quantize_rows_kernel, arguments, options, name=f"quantize_rows {form}")
    print(table([built]))
    assert built.spill_bytes == built.local_memory == built.too_early == 0
    assert built.counts["LDG.128"] > 0, "eight values of 16 bits at once"


def test_it_says_why_not() -> None:
    rows = make_rows(2, 256, "normed")
    assert "CUDA device" in "; ".join(triton_reasons(*rows.tensors, **rows.settings))
    x, _, norm, _ = rows.tensors
    assert norm is not None
    spread = torch.zeros(2, 256, 2)[..., 0]
    assert "next to each other" in "; ".join(triton_reasons(spread, None, norm, None, **rows.settings))
    wide, long = torch.zeros(2, 20000), torch.zeros(20000)
    assert "normalizes up to 16384" in "; ".join(triton_reasons(wide, None, long, None, **rows.settings))
    assert "float64" in "; ".join(triton_reasons(x, None, norm.double(), None, **rows.settings))
