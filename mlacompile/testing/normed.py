"""Random inputs of ``fp8_normed``, what they come to in float64, and how far from it a kernel may be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlacompile.ops.quantize_rows import STRETCH
from mlacompile.testing.scaled import Product, exact, make_product, worst


@dataclass
class Normed:
    """One call: products of the same x, and the squares of rows that it might have been made of."""

    products: list[Product]
    squares: Tensor
    eps: float = 1e-6

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """In the order of the op, without the dtype."""
        first = self.products[0]
        assert first.x_descale is not None
        weights, descales = [p.weight for p in self.products], [p.weight_descale for p in self.products]
        return first.x, first.x_descale, self.squares, weights, descales


def make_normed(m: int, rows: tuple[int, ...], k: int, *, kind: str = "plain", device: str = "cpu") -> Normed:
    """x ``[m, k]`` of a kind and weights of so many rows."""
    made = [make_product(m, n, k, quantized=True, kind=kind, device=device, seed=i) for i, n in enumerate(rows)]
    first = made[0]
    generator = torch.Generator(device).manual_seed(k)
    squares = torch.rand(m, -(-k // STRETCH), generator=generator, device=device) * STRETCH
    return Normed([replace(p, x=first.x, x_descale=first.x_descale) for p in made], squares)


def worst_normed(case: Normed, got: Tensor) -> str:
    """What is wrong with a result, or nothing: products as in ``fp8_linear``, and a root of few sums in float32."""
    root = torch.rsqrt(case.squares.double().sum(1, keepdim=True) / case.products[0].x.shape[1] + case.eps)
    pairs = [exact(product, got.dtype) for product in case.products]
    want, bound = (torch.cat([pair[i] for pair in pairs], 1) * root for i in (0, 1))
    tiny = torch.finfo(got.dtype).smallest_normal
    return worst(got, want, bound + want.abs() * (case.squares.shape[1] + 8) * 2.0**-24 + tiny)
