"""Runs ``row_product`` and ``head_product`` in Triton's interpreter; a process of its own. One line a failure."""

from __future__ import annotations

import interpreted  # noqa: F401  (sets the mode)
import torch

from mlacompile.kernels.head_product.launch import head_product_triton
from mlacompile.kernels.row_product.launch import row_product_triton
from mlacompile.ops import head_product_reference, row_product_reference


def differs(got: torch.Tensor, want: torch.Tensor, terms: int) -> bool:
    """Whether float32 sums of so many terms explain the difference from float64; sizes are of order one."""
    return not bool(((got.double() - want).abs() <= terms * 2**-24 * (1 + want.abs())).all())


def rows() -> None:
    for k, sizes, gate, norm, added in [
        (40, [7, 33], "", False, False),
        (1032, [9], "", True, True),
        (72, [5, 5], "silu", True, False),
        (512, [6, 6], "gelu", False, True),
        (2048, [3, 3], "gelu_tanh", True, True),
        (24, [3, 4, 5], "", True, False),
    ]:
        x = torch.randn(1, k)
        weights = [torch.randn(n, k + 8)[:, :k] / k**0.5 for n in sizes]
        g = torch.randn(k) if norm else None
        residual = torch.randn(1, sizes[0]) if added else None
        got = row_product_triton(x, weights, g, residual, eps=1e-5, gate=gate)
        doubles = [w.double() for w in weights], [], *(None if t is None else t.double() for t in (g, residual))
        want = row_product_reference(x.double(), *doubles, eps=1e-5, gate=gate)
        if len(got) != len(want) or any(differs(a, b, 4 * k) for a, b in zip(got, want, strict=True)):
            print(f"row_product {k} {sizes} {gate} {norm} {added}")


def heads() -> None:
    for h, k, n, along in [(3, 128, 512, False), (2, 512, 128, True), (5, 24, 40, False), (1, 1040, 16, True)]:
        rows, columns = (n, k) if along else (k, n)
        weight = torch.randn(h, rows + 3, columns + 8)[:, :rows, :columns] / k**0.5
        weight = weight.transpose(1, 2) if along else weight
        x = torch.randn(h, 1, k + 8)[:, :, :k]
        got = head_product_triton(x, weight)
        if not got.is_contiguous() or differs(got, head_product_reference(x.double(), weight.double()), k):
            print(f"head_product {h} {k} {n} {along}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows()
    heads()
