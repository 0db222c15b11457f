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
    shaping = {key: rows.settings[key] for key in ("parts", "squares", "beside", "dtype") if key in rows.settings}
    results = empty_results(x, added, **shaping)
    grid, arguments, options = launch(*tensors, results, **rows.settings)  # type: ignore[arg-type]
    blocks = 1 if "normed" in form and "squares" not in form else 4
    assert grid == (64, blocks + 1 if "beside" in form else blocks)
    from mlacompile.kernels.quantize_rows.portable import _quantize_rows_kernel

    built = compile_for(_quantize_rows_kernel, arguments, options, name=f"quantize_rows {form}")
    print(table([built]))
    assert built.spill_bytes == built.local_memory == built.too_early == 0
    assert built.counts["LDG.128"] > 0, "eight values of 16 bits at once"


def test_what_it_may_drop() -> None:
    """Whole lines, each of them read by one program."""
    room = torch.zeros(8192, dtype=torch.bfloat16)
    begin = -room.data_ptr() % 128 // 2  # memory of a CPU begins anywhere

    def drops(x: torch.Tensor, gated: torch.Tensor | None = None) -> bool:
        results = empty_results(x, None)
        _, arguments, _ = launch(x, None, None, gated, results, eps=0.0, gate="silu" if gated is not None else "",
                                 spent=True)  # fmt: skip
        return bool(arguments["SPENT"])

    lines = room[begin:]
    both = lines[: 4 * 512].view(4, 512)
    assert drops(both)
    assert drops(both[:, :256], both[:, 256:])
    assert drops(both[:, :256], both[:, :256])
    assert not drops(lines[32:][: 4 * 512].view(4, 512)), "begins within a line"
    assert not drops(lines[: 4 * 672].view(4, 672)[:, :512]), "rows begin within lines"
    assert not drops(lines[: 4 * 320].view(4, 320)), "the last group is half a one"
    assert not drops(lines[:512].expand(4, 512)), "rows are one and the same"
    assert not drops(both[:, :256], both[:, 128:384]), "each is part of the other"
    assert drops(lines[: 6 * 128 * 4].view(4, 6, 128).transpose(0, 1)), "heads"

    def drops_parts(beside: int) -> bool:
        x = lines[: 2 * 2 * 2 * (256 + beside)].view(torch.float32).view(2, 2, 256 + beside)
        results = empty_results(x, None, parts=True, beside=beside, dtype=torch.bfloat16)
        _, arguments, _ = launch(x, None, None, None, results, eps=0.0, gate="", parts=True, beside=beside,
                                 dtype=torch.bfloat16, spent=True)  # fmt: skip
        return bool(arguments["SPENT"])

    assert drops_parts(32)
    assert not drops_parts(48), "what is beside ends within a line"


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
