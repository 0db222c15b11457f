"""``fp8_stacked``: its reference, its fake, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import fp8_linear
from mlacompile.ops.fp8_stacked import fp8_stacked
from mlacompile.testing.scaled import Product, make_product


def stacked(m: int, rows: tuple[int, int], k: int, *, quantized: bool) -> tuple[list[Product], tuple[Any, ...]]:
    """Two products of one x, and the arguments that make them one."""
    first, second = (make_product(m, n, k, quantized=quantized, seed=i) for i, n in enumerate(rows))
    products = [Product(first.x, first.x_descale, p.weight, p.weight_descale) for p in (first, second)]
    weights, descales = [p.weight for p in products], [p.weight_descale for p in products]
    return products, (first.x, first.x_descale, weights, descales, torch.bfloat16)


@pytest.mark.parametrize("quantized", [False, True])
def test_it_is_both_products_side_by_side(quantized: bool) -> None:
    products, arguments = stacked(5, (256, 72), 272, quantized=quantized)
    want = torch.cat([fp8_linear(*p.tensors, torch.bfloat16) for p in products], -1)
    assert torch.equal(fp8_stacked(*arguments), want)
    torch.library.opcheck(fp8_stacked, arguments, test_utils="test_faketensor")


def test_it_refuses_what_does_not_stack() -> None:
    _, (x, descale, weights, descales, dtype) = stacked(2, (256, 64), 144, quantized=True)
    with pytest.raises(UnsupportedInputError, match=r"\[\[64, 144\], \[256, 144\]\].*multiples of 128"):
        fp8_stacked(x, descale, weights[::-1], descales[::-1], dtype)
    with pytest.raises(UnsupportedInputError, match="expected two"):
        fp8_stacked(x, descale, weights[:1], descales[:1], dtype)
    with pytest.raises(UnsupportedInputError, match=r"fp8_stacked: got a weight .* scales"):
        fp8_stacked(x, descale, weights, descales[::-1], dtype)
    with pytest.raises(UnsupportedInputError, match=r"fp8_stacked: got x of"):
        fp8_stacked(x[:, :128], descale, weights, descales, dtype)
    with pytest.raises(UnsupportedInputError, match="impl='stream' cannot take these inputs"):
        fp8_stacked(x, descale, weights, descales, dtype, impl="stream")
    with pytest.raises(UnsupportedInputError, match="no kernel 'fast'; it has triton, stream"):
        fp8_stacked(x, descale, weights, descales, dtype, impl="fast")


@pytest.mark.parametrize(
    ("m", "rows", "k", "quantized", "chosen"),
    [
        (2, (1536, 576), 7168, False, None),
        (16, (18432, 18432), 7168, False, "triton"),
        (64, (1536, 576), 7168, True, "stream"),
        (128, (1536, 576), 7168, True, "triton"),
        (64, (18432, 18432), 7168, True, "stream"),
        (128, (18432, 18432), 7168, True, "stream"),
        (256, (18432, 18432), 7168, True, None),
    ],
)
def test_which_kernel_is_fast(m: int, rows: tuple[int, int], k: int, quantized: bool, chosen: str | None) -> None:
    x = torch.empty(m, k, device="meta")
    weights = [torch.empty(n, k, device="meta") for n in rows]
    arguments = (x, x if quantized else None, weights, weights, torch.bfloat16)
    fast = [kernel.name for kernel in registry.kernels("fp8_stacked") if not kernel.slower(*arguments)]
    assert fast[:1] == ([chosen] if chosen else [])
