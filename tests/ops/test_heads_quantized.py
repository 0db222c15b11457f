"""``heads_quantized``: its reference against float64 and against both of its parts, its fake, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlacompile.errors import UnsupportedInputError
from mlacompile.ops.fp8_linear import E4M3, fp8_linear
from mlacompile.ops.fp8_quantize import fp8_quantize
from mlacompile.ops.heads_quantized import heads_quantized
from mlacompile.ops.quantize_rows import quantize_rows
from mlacompile.testing.heads import make_heads, worst_quantized


@pytest.mark.parametrize("kind", ["plain", "tiny", "zeros"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "heads", "k"), [(5, 3, 512), (17, 2, 96), (1, 1, 16)])
def test_it_is_what_it_says(m: int, heads: int, k: int, dtype: torch.dtype, kind: str) -> None:
    product = make_heads(m, heads, 128, k, kind=kind, dtype=dtype)
    arguments = product.x, product.weight, product.weight_descale
    assert not worst_quantized(product, heads_quantized(*arguments))
    torch.library.opcheck(heads_quantized, arguments, {"spent": True}, test_utils="test_faketensor")


@pytest.mark.parametrize("spent", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_both_of_its_parts(dtype: torch.dtype, spent: bool) -> None:
    product = make_heads(7, 4, 128, 256, kind="outliers", dtype=dtype)
    before = product.x.clone()
    got = heads_quantized(product.x, product.weight, product.weight_descale, spent=spent, impl="reference")
    heads = fp8_linear(*product.tensors, dtype, impl="reference").transpose(0, 1)
    for want in (fp8_quantize(heads.flatten(1), 128, E4M3), quantize_rows(heads)):
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(product.x, before), "nothing is dropped here"


def test_a_group_is_a_head() -> None:
    """What is not finite in one head, and zeros in another, are no matter to the others."""
    product = make_heads(4, 3, 128, 64)
    product.x[1, 2, 5], product.x[0, 3] = torch.nan, 0
    q, descale = heads_quantized(product.x, product.weight, product.weight_descale)
    assert descale.isnan().nonzero().tolist() == [[2, 1]]
    assert descale[3, 0] == 1
    assert (q[3, :128].float() == 0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"x": torch.zeros(4, 64)},
            r"got x of torch.float32 \[4, 64\] and a weight \[2, 128, 64\]; expected \[H, M, K\] of",
        ),
        ({"x": torch.zeros(3, 4, 64)}, r"got x of torch.float32 \[3, 4, 64\]"),
        ({"x": torch.zeros(2, 4, 128)}, r"got x of torch.float32 \[2, 4, 128\]"),
        ({"x": torch.zeros(2, 4, 64).to(E4M3)}, r"got x of torch.float8_e4m3fn .* of 16 or 32 bits"),
        ({"weight": torch.zeros(2, 128, 64)}, "heads_quantized: got a weight of torch.float32"),
        ({"weight_descale": torch.ones(2, 1, 2)}, r"expected .* and torch.float32 \[2, 1, 1\]"),
        ({"weight": torch.zeros(2, 64, 64).to(E4M3)}, r"a weight \[2, 64, 64\]; expected"),
        (
            {"weight": torch.zeros(128, 64).to(E4M3), "weight_descale": torch.ones(1, 1)},
            r"a weight \[128, 64\]; expected \[H, M, K\] of 16 or 32 bits and \[H, 128, K\]",
        ),
        ({"impl": "heads"}, "impl='heads' cannot take these inputs: .*CUDA device"),
        ({"impl": "heads", "x": torch.zeros(2, 65, 64)}, "x has 65 rows, the kernel takes 1 to 64"),
        ({"impl": "fast"}, "no kernel 'fast'; it has heads"),
    ],
)
def test_it_refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    product = make_heads(4, 2, 128, 64)
    inputs = {"x": product.x, "weight": product.weight, "weight_descale": product.weight_descale}
    with pytest.raises(UnsupportedInputError, match=message):
        heads_quantized(**(inputs | changed))
