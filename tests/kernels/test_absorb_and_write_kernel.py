"""``absorb_and_write``: its checks, the kernel in Triton's interpreter, what it compiles to, its parity on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels.absorb_and_write.supports import triton_reasons
from mlacompile.ops.absorb_and_write import absorb_and_write
from mlacompile.testing.absorbed import AbsorbCase, make_absorbed, wrong_in


@pytest.mark.parametrize("kind", ["token", "block", "static"])
def test_as_an_op(kind: str) -> None:
    case = AbsorbCase(3, 2, 128, 64, 8, kind=kind)
    assert not wrong_in(case, "reference")
    made = make_absorbed(case)
    # The others compare inputs, which PyTorch cannot in FP8.
    torch.library.opcheck(absorb_and_write, made.arguments, made.settings, test_utils="test_faketensor")


def test_wrong_inputs_say_what_was_expected() -> None:
    made = make_absorbed(AbsorbCase(3, 2, 128, 64, 8))
    x, weight, *rest = made.arguments
    for wrong in ((x[0], weight), (x, weight[:1]), (x, weight.float())):
        with pytest.raises(UnsupportedInputError, match=r"expected \[H, M, K\]"):
            absorb_and_write(*wrong, *rest, **made.settings)
    with pytest.raises(UnsupportedInputError, match="cannot take these inputs"):
        absorb_and_write(*made.arguments, **made.settings, impl="triton")


def test_kernel_says_why_not() -> None:
    made = make_absorbed(AbsorbCase(3, 2, 128, 64, 8, dtype=torch.float32))
    reasons = "; ".join(triton_reasons(*made.arguments, **made.settings))
    assert "the kernel multiplies in float16, bfloat16 or FP8" in reasons
    assert reasons.count("CUDA") == 1


def test_kernel_logic() -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    script = Path(__file__).with_name("interpreted_absorb.py")
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(script.parent)])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("kind", ["token", "block"])
def test_it_is_both_kernels_and_no_more(kind: str) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    from mlacompile.kernels.absorb_and_write.launch import launch
    from mlacompile.testing.sass import compile_for, table

    made = make_absorbed(AbsorbCase(64, 128, 512, 128, 64, kind=kind, device="meta"))
    absorbed = torch.empty(128, 64, 512, dtype=torch.bfloat16, device="meta")
    one = launch(*made.product, made.write.arguments, absorbed, made.write.arguments[2], **made.settings)
    assert one.grid == (64 * 9 + 128 * 8,)
    built = compile_for(one.kernel, one.arguments, one.options, name=f"absorb_and_write {kind}")
    print(table([built]))
    assert built.local_memory == built.spill_bytes == built.too_early == 0
    assert built.serialized <= 1, "an assertion is a call, and products wait for one another: no slower, measured"
    assert built.counts["HGMMA"] == 128 // 16
    assert built.counts["UTMALDG"] == 2
    assert built.registers <= 128, "four programs an SM"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
)
@pytest.mark.parametrize("kind", ["token", "block", "block e5m2", "static", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity(kind: str, dtype: torch.dtype) -> None:
    for rows, heads, rank, nope, rope in ((64, 128, 512, 128, 64), (16, 20, 256, 64, 32), (3, 5, 208, 192, 24)):
        case = AbsorbCase(rows, heads, rank, nope, rope, kind=kind, dtype=dtype, device="cuda")
        assert not (wrong := wrong_in(case, "triton")), (case, wrong)
