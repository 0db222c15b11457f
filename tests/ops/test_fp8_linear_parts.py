"""``fp8_linear_parts``: its reference against float64, its fake, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import filled_parts
from mlacompile.ops.fp8_linear_parts import fp8_linear_parts
from mlacompile.testing.scaled import Product, exact, make_product, worst


@pytest.mark.parametrize(
    ("m", "n", "k", "parts"), [(3, 200, 784, 3), (5, 128, 1024, 4), (1, 8, 16, 1), (2, 16, 400, 2)]
)
def test_it_is_what_it_says(m: int, n: int, k: int, parts: int) -> None:
    product = make_product(m, n, k, quantized=True, kind="outliers")
    assert product.x_descale is not None
    got = fp8_linear_parts(*product.tensors, parts)
    assert got.shape == (parts, m, n)
    assert got.dtype == torch.float32
    groups = -(-product.x_descale.shape[1] // parts)
    for i, part in enumerate(got):
        columns, scales = slice(i * groups * 128, (i + 1) * groups * 128), slice(i * groups, (i + 1) * groups)
        piece = Product(
            product.x[:, columns], product.x_descale[:, scales],
            product.weight[:, columns], product.weight_descale[:, scales],
        )  # fmt: skip
        assert not worst(part, *exact(piece, torch.float32))
    torch.library.opcheck(fp8_linear_parts, (*product.tensors, parts), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (0, {}, r"x \[2, 640\] in 0 parts; expected \[M, K\] in parts of equally many of its 5 blocks"),
        (4, {}, "none of them empty"),
        (6, {}, "none of them empty"),
        (2, {"impl": "stream"}, "impl='stream' cannot take these inputs: .*CUDA device"),
        (2, {"impl": "fast"}, "no kernel 'fast'; it has stream"),
    ],
)
def test_it_refuses_what_does_not_fit(parts: int, settings: dict[str, Any], message: str) -> None:
    product = make_product(2, 8, 640, quantized=True)
    with pytest.raises(UnsupportedInputError, match=message):
        fp8_linear_parts(*product.tensors, parts, **settings)


@given(st.integers(0, 300), st.integers(1, 40))
def test_parts_that_are_filled(count: int, parts: int) -> None:
    filled = filled_parts(count, parts)
    assert 1 <= filled <= parts
    each = -(-count // filled)
    assert (filled - 1) * each < max(count, 1) <= max(filled * each, 1), "the last has some, and nothing is left over"
    assert filled_parts(count, filled) == filled


def test_heads_have_no_parts() -> None:
    x = torch.zeros(2, 3, 128, dtype=torch.float8_e4m3fn)
    weight, descale = torch.zeros(2, 8, 128, dtype=torch.float8_e4m3fn), torch.ones(2, 1, 1)
    with pytest.raises(UnsupportedInputError, match=r"expected \[M, K\]"):
        fp8_linear_parts(x, torch.ones(2, 3, 1), weight, descale, 1)
