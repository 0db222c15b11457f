"""``quantize_rows``: its reference against float64, its fake, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlacompile.errors import UnsupportedInputError
from mlacompile.ops.fp8_quantize import fp8_quantize
from mlacompile.ops.quantize_rows import quantize_rows
from mlacompile.testing.quantized_rows import FORMS, make_rows, worst_rows


@pytest.mark.parametrize("kind", ["plain", "outliers", "tiny", "zeros"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_it_says(form: str, kind: str) -> None:
    for k in (256, 1536) if form == "heads" else (256, 200, 1552):
        rows = make_rows(5, k, form, kind=kind)
        results = quantize_rows(*rows.tensors, **rows.settings)
        assert not worst_rows(rows, results)
        assert all(x.is_contiguous() for x in results)
        torch.library.opcheck(quantize_rows, rows.tensors, rows.settings, test_utils="test_faketensor")


def test_without_anything_before_it_is_fp8_quantize() -> None:
    rows = make_rows(3, 400, "plain")
    for got, want in zip(quantize_rows(*rows.tensors), fp8_quantize(rows.tensors[0], 128, torch.float8_e4m3fn)):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 3, 64)}, r"got x of torch.float32 \[2, 3, 64\]; expected \[M, K\] or \[M, H, 128\]"),
        ({"added": torch.zeros(2, 128)}, r"got added of torch.float32 \[2, 128\]; expected torch.float32 \[2, 256\]"),
        ({"gated": torch.zeros(2, 256).half(), "gate": "silu"}, "got gated of torch.float16"),
        ({"norm": torch.ones(255)}, r"got norm \[255\]; expected \[256\]"),
        (
            {"parts": True},
            r"parts of torch.float32 \[2, 256\] and nothing to add them to; expected torch.float32 \[P, M",
        ),
        (
            {"x": torch.zeros(3, 2, 256), "added": torch.zeros(2, 128), "parts": True},
            r"got added of torch.float32 \[2, 128\]; expected torch.float32 \[2, 256\]",
        ),
        ({"gate": "silu"}, "with no tensor to gate"),
        ({"squares": True}, "got squares=True and no norm; expected one"),
        ({"gated": torch.zeros(2, 256), "gate": "relu"}, "expected one of silu"),
        ({"gated": torch.zeros(2, 256), "gate": "silu", "norm": torch.ones(256)}, "a tensor and without a norm"),
        ({"beside": 32}, r"got beside=32 and x \[2, 256\]; expected parts \[P, M, K \+ beside\]"),
        ({"x": torch.zeros(2, 2, 256), "parts": True, "dtype": torch.bfloat16, "beside": 256}, "got beside=256"),
        ({"impl": "triton"}, "impl='triton' cannot take these inputs: .*CUDA device"),
        ({"impl": "fast"}, "no kernel 'fast'; it has triton"),
    ],
)
def test_it_refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        quantize_rows(**({"x": torch.zeros(2, 256)} | changed))
