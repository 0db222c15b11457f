"""Inputs of ``absorb_and_write`` for tests: a product of heads beside a write, and what is wrong with results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlacompile.ops.absorb_and_write import absorb_and_write, absorb_and_write_reference
from mlacompile.ops.fp8_linear import E4M3, block_grid, fp8_dequantize_weight, fp8_quantize_weight
from mlacompile.testing.written import Write, WriteCase, differences, make_write


@dataclass(frozen=True)
class AbsorbCase:
    """Sizes: rows of one token each, heads, rank of a latent, values of a head that are absorbed, and rotated."""

    rows: int
    heads: int
    rank: int
    nope: int
    rope: int
    kind: str = "token"
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"


@dataclass(frozen=True)
class Absorbed:
    """The product's part of the arguments, and the write's."""

    product: tuple[Tensor, Tensor, Tensor]
    write: Write

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (*self.product, *self.write.arguments)

    @property
    def settings(self) -> dict[str, Any]:
        return self.write.settings


def make_absorbed(case: AbsorbCase) -> Absorbed:
    """Queries lie as a projection leaves them, absorbed and rotated values of a head behind one another."""
    pairs = "interleaved to halves"
    write = make_write(
        WriteCase(
            case.rows, 1, case.rank, case.rope, case.heads, case.kind, pairs, dtype=case.dtype, device=case.device
        )
    )
    meta = case.device == "meta"
    generator = None if meta else torch.Generator(case.device).manual_seed(7)
    queries = torch.randn(case.rows, case.heads, case.nope + case.rope, generator=generator, device=case.device)
    shape = (case.heads, case.rank, case.nope)
    if meta:
        weight = torch.empty(shape, dtype=E4M3, device="meta")
        descale = torch.empty((case.heads, *block_grid(*shape[1:])), device="meta")
    else:
        weight, descale = fp8_quantize_weight(torch.randn(shape, generator=generator, device=case.device))
    x = queries.to(case.dtype)[..., : case.nope].transpose(0, 1)
    return Absorbed((x, weight, descale), write)


def wrong_in(case: AbsorbCase, impl: str) -> str:
    """What is wrong with the results of a kernel, or nothing.

    The product: sums of K products of what 16 bits hold exactly, in float32, and one rounding of the result.
    """
    got, want = make_absorbed(case), make_absorbed(case)
    absorbed, turned = absorb_and_write(*got.arguments, **got.settings, impl=impl)
    _, exact = absorb_and_write_reference(*want.arguments, **want.settings)
    x, weight, descale = want.product
    wide = x.double(), fp8_dequantize_weight(weight, descale, torch.float64)
    product, sizes = wide[0] @ wide[1].transpose(1, 2), wide[0].abs() @ wide[1].abs().transpose(1, 2)
    allowed = product.abs() * torch.finfo(case.dtype).eps + sizes * (case.nope + 8) * 2.0**-24
    off = (absorbed.double() - product).abs()
    if not (off <= allowed).all():
        return f"the product is off by {float((off / allowed).max()):.2f} times what it may be"
    return differences(got.write, turned, want.write, exact)
