"""``row_product``: the reference, its checks, what the kernel compiles to, and its parity on a GPU."""

from __future__ import annotations

import pytest
import torch

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels.row_product.supports import triton_reasons
from mlacompile.ops import row_product

SHAPES = [(576, 7168), (24576, 1536), (2048, 10944), (7, 8), (1000, 2056), (33, 24)]


def test_reference_is_the_product() -> None:
    x, weight = torch.randn(1, 24), torch.randn(7, 24)
    other = torch.randn(5, 24)
    got = row_product(x, [weight, other])
    assert torch.equal(got[0], x @ weight.t())
    assert torch.equal(got[1], x @ other.t())
    torch.library.opcheck(row_product, (x, [weight, other]))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(2, 8), torch.ones(3, 8)),
        (torch.ones(1, 8), torch.ones(3, 7)),
        (torch.ones(1, 8), torch.ones(3, 8, dtype=torch.bfloat16)),
    ],
)
def test_wrong_inputs_say_what_was_expected(x: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(UnsupportedInputError, match=r"expected \[1, K\] and \[N, K\] of one dtype"):
        row_product(x, [weight])


def test_kernel_says_why_not() -> None:
    weight = torch.ones(8, 12, dtype=torch.float32).t()
    reasons = "; ".join(triton_reasons(torch.ones(1, 8), [weight]))
    assert "float16 and bfloat16" in reasons
    assert "the kernel needs 1" in reasons
    with pytest.raises(UnsupportedInputError, match="cannot take these inputs"):
        row_product(torch.ones(1, 8), [torch.ones(3, 8)], impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity(n: int, k: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, k, device="cuda").to(dtype)
    weights = [torch.randn(rows, k + 8, device="cuda").to(dtype)[:, :k] for rows in (n, 7, 33)]  # rows lie apart
    for got, weight in zip(row_product(x, weights, impl="triton"), weights, strict=True):
        want = x.double() @ weight.double().t()
        rounded = (x.float() @ weight.float().t()).to(dtype).double()
        # float32 sums rounded once: no farther from float64 than the float32 product rounded once, and half a unit
        allowed = (rounded - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed
