"""The kernel of ``quantize_rows`` on a GPU against float64: every form, odd sizes, outliers, zeros, strides."""

from __future__ import annotations

import pytest
import torch

from mlacompile.ops.fp8_quantize import fp8_dequantize
from mlacompile.ops.quantize_rows import quantize_rows, quantize_rows_reference
from mlacompile.testing.quantized_rows import FORMS, make_rows, worst_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "outliers", "tiny", "zeros"])
@pytest.mark.parametrize("form", FORMS)
def test_parity(form: str, kind: str, dtype: torch.dtype) -> None:
    for m, k in ((1, 128), (64, 7168), (17, 1552), (3, 18432), (5, 200)):
        if (form == "heads" and k % 128) or ("normed" in form and "squares" not in form and k > 16384):
            continue
        rows = make_rows(m, k, form, kind=kind, dtype=dtype, device="cuda")
        assert not (wrong := worst_rows(rows, quantize_rows(*rows.tensors, **rows.settings, impl="triton"))), (
            m,
            k,
            wrong,
        )


def test_not_finite() -> None:
    for value in (torch.inf, -torch.inf, torch.nan):
        rows = make_rows(4, 512, "plain", device="cuda")
        rows.tensors[0][2, 300] = value
        got, want = quantize_rows(*rows.tensors, impl="triton"), quantize_rows_reference(*rows.tensors, **rows.settings)
        assert torch.equal(got[1].isnan(), want[1].isnan())
        assert got[1].isnan().nonzero().tolist() == [[2, 2]]


def test_scales_are_the_reference_to_the_bit() -> None:
    """On a CPU: on a GPU PyTorch divides by a constant by multiplying with its inverse. A value in the middle between
    two of FP8 may go to either."""
    for kind in ("plain", "outliers", "tiny", "zeros"):
        rows = make_rows(33, 1552, "plain", kind=kind)
        got, descale = (x.cpu() for x in quantize_rows(rows.tensors[0].cuda(), impl="triton"))
        want, want_descale = quantize_rows_reference(*rows.tensors, **rows.settings)
        assert torch.equal(descale, want_descale)
        one, other = (fp8_dequantize(q, descale, 128, torch.float64) for q in (got, want))
        x = rows.tensors[0].double()
        off = ((one - x).abs() - (other - x).abs()).abs()
        assert (off <= x.abs() * 2.0**-21).all(), "equally far"


@pytest.mark.parametrize("form", FORMS)
def test_what_is_spent_is_dropped_and_nothing_else(form: str) -> None:
    """What was dropped is not in memory: there is what was written there before, unless L2 had been written out."""
    m, k = 64, 7168
    rows = make_rows(m, k, form, device="cuda")
    want = quantize_rows(*rows.tensors, **rows.settings, impl="triton")
    x, added, norm, gated = rows.tensors
    done = torch.randn(m, 640, device="cuda")
    spent = [x, done] if gated is None else [x, done, gated]
    around = [t if t._base is None else t._base for t in (*spent, *(t for t in (added, norm) if t is not None))]
    written = [whole.clone() for whole in around]
    through_l2 = torch.ones(128 << 20, device="cuda")  # several times its size
    lost = torch.zeros(len(spent))
    for _ in range(10):  # the first one compiles, and other processes may come between
        for whole in around:
            whole.fill_(1.0)
        through_l2.add_(1)
        for whole, values in zip(around, written, strict=True):
            whole.copy_(values)
        got = quantize_rows(x, added, norm, gated, done, **rows.settings, spent=True, impl="triton")
        through_l2.add_(1)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        lost = lost.maximum(torch.tensor([(part == 1.0).float().mean() for part in spent]))
        for part in spent:
            part.fill_(2.0)
        for whole, values in zip(around, written, strict=True):
            kept = (whole == values) | (whole.isnan() & values.isnan()) | (whole == 2.0)
            assert kept.all(), "lost, and not spent"
    assert (lost > 0.5).all(), f"of x and what is done {lost.tolist()} was not written to memory"
