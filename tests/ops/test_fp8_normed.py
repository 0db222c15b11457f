"""``fp8_normed``: with ``quantize_rows`` before it against a norm and a product in float64, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.ops.fp8_normed import fp8_normed
from mlacompile.testing.normed import make_normed, worst_normed


@pytest.mark.parametrize("kind", ["plain", "outliers", "zeros"])
@pytest.mark.parametrize(("m", "rows", "k"), [(5, (200,), 4112), (3, (256, 72), 2064), (2, (8,), 128)])
def test_it_is_what_it_says(m: int, rows: tuple[int, ...], k: int, kind: str) -> None:
    case = make_normed(m, rows, k, kind=kind)
    for dtype in (torch.float32, torch.bfloat16):
        got = fp8_normed(*case.arguments, dtype, eps=case.eps)
        assert not worst_normed(case, got)
        torch.library.opcheck(
            fp8_normed, (*case.arguments, dtype), {"eps": case.eps}, test_utils="test_faketensor"
        )  # fmt: skip


def test_parts_come_to_the_same() -> None:
    case = make_normed(5, (256, 72), 2064)
    whole = fp8_normed(*case.arguments, torch.float32, eps=case.eps)
    parts = fp8_normed(*case.arguments, torch.bfloat16, eps=case.eps, parts=3)
    assert parts.shape == (3, 5, 328)
    assert parts.dtype == torch.float32
    torch.testing.assert_close(parts.sum(0), whole)
    torch.library.opcheck(
        fp8_normed, (*case.arguments, torch.bfloat16), {"eps": case.eps, "parts": 3}, test_utils="test_faketensor"
    )  # fmt: skip


def test_the_root_is_that_of_the_norm() -> None:
    """Rows that are a thousand times larger come to the same."""
    case = make_normed(4, (128,), 4096)
    x, descale, squares, weights, descales = case.arguments
    once = fp8_normed(x, descale, squares, weights, descales, torch.float32, eps=0.0)
    large = fp8_normed(x, descale * 1024, squares * 1024**2, weights, descales, torch.float32, eps=0.0)
    torch.testing.assert_close(large, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({2: torch.ones(3, 2)}, {}, r"got squares of torch.float32 \[3, 2\]; expected torch.float32 \[3, 3\]"),
        ({2: torch.ones(3, 3).double()}, {}, "got squares of torch.float64"),
        ({3: []}, {}, r"got weights \[\] with 1 scales; expected one or two"),
        ({3: [torch.zeros(2, 8, 4112)]}, {}, "expected one or two"),
        ({4: [torch.ones(1, 1)]}, {}, "fp8_normed: got a weight"),
        ({}, {"impl": "stream"}, "impl='stream' cannot take these inputs: .*CUDA device"),
        ({}, {"impl": "fast"}, "no kernel 'fast'; it has stream"),
        ({}, {"parts": 32}, r"fp8_normed: got x \[3, 4112\] in 32 parts; expected \[M, K\] in parts of equally many"),
    ],
)
def test_it_refuses_what_does_not_fit(changed: dict[int, Any], settings: dict[str, Any], message: str) -> None:
    arguments: list[Tensor | list[Tensor]] = list(make_normed(3, (8,), 4112).arguments)
    for i, value in changed.items():
        arguments[i] = value
    with pytest.raises(UnsupportedInputError, match=message):
        fp8_normed(*arguments, torch.bfloat16, eps=0.0, **settings)  # type: ignore[arg-type]
