"""Products with FP8 weights on inputs that try to break them, and the float64 answer with the error that is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.ops.fp8_linear import fp8_dequantize_weight, fp8_quantize_weight
from mlacompile.ops.fp8_quantize import fp8_dequantize, fp8_quantize, in_groups

E4M3 = torch.float8_e4m3fn
KINDS = ("plain", "outliers", "tiny", "zeros")
#: Error of one sum of 128 products in FP8 on a Hopper tensor core, relative to the largest of them. Each step of 32
#: products and the sum so far is aligned to the largest term and cut 13 bits below it (arXiv 2412.19437, 3.3.2).
FP8_SUM = 4 * 33 * 2.0**-13


@dataclass(frozen=True)
class Product:
    """Arguments of ``fp8_linear`` but the last."""

    x: Tensor
    x_descale: Tensor | None
    weight: Tensor
    weight_descale: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """In the order of the op."""
        return self.x, self.x_descale, self.weight, self.weight_descale


def values(shape: tuple[int, ...], kind: str, device: str, seed: int) -> Tensor:
    """float32 of a kind: "plain"; "outliers" of 10⁴ in some blocks; "tiny", of denormals of the scaled type and of
    blocks too small for a scale; "zeros", whole blocks of them."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device)
    if kind == "outliers":
        x = torch.where(torch.rand(shape, generator=generator, device=device) < 1e-3, x * 1e4, x)
    elif kind == "tiny":
        x = x * torch.exp2(-30 * torch.rand(shape, generator=generator, device=device))
        x[..., : SCALE_GROUP // 2] *= 2.0**-60
    elif kind == "zeros":
        x[..., :SCALE_GROUP] = 0
        x[..., : shape[-2] // 2, -SCALE_GROUP:] = 0
    return x


def make_product(
    m: int, n: int, k: int, *, heads: int = 0, quantized: bool = False, kind: str = "plain",
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0,
) -> Product:  # fmt: skip
    """Random factors of a kind: x ``[(heads,) m, k]``, of ``dtype`` or quantized, and a weight ``[(heads,) n, k]``."""
    first = (heads,) if heads else ()
    x = values((*first, m, k), kind, device, seed).to(dtype)
    weight = fp8_quantize_weight(values((*first, n, k), kind, device, seed + 1) * k**-0.5)
    if not quantized:
        return Product(x, None, *weight)
    return Product(*fp8_quantize(x, SCALE_GROUP, E4M3), *weight)


def exact(product: Product, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it a kernel may be that returns ``dtype``."""
    x = product.x.double()
    if product.x_descale is not None:
        x = fp8_dequantize(product.x, product.x_descale, SCALE_GROUP, torch.float64)
    weight = fp8_dequantize_weight(product.weight, product.weight_descale, torch.float64)
    want = x @ weight.transpose(-1, -2)
    sizes = x.abs() @ weight.abs().transpose(-1, -2)
    # Sums in float32, truncated, in any order, of products scaled twice; then a rounding to the dtype of the result.
    bound = sizes * (x.shape[-1] + 4) * 2.0**-23
    if product.x_descale is not None and dtype != torch.float32:  # else they are summed in all bits of float32
        bound += FP8_SUM * (_largest(x) @ _largest(weight).transpose(-1, -2))
    unit = 2.0**-24 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return want, bound + want.abs() * unit * 1.01 + torch.finfo(dtype).smallest_normal


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value of every group of a row."""
    return torch.cat([part.abs().amax(-1) for part in in_groups(x, SCALE_GROUP)], -1)


def worst(got: Tensor, want: Tensor, bound: Tensor) -> str:
    """Where ``got`` is farther from ``want`` than allowed, in words; "" where nowhere."""
    error = (got.double() - want).abs()
    excess = (error / bound).nan_to_num(nan=float("inf"))
    if bool((excess <= 1).all()):
        return ""
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    return (
        f"{int((excess > 1).sum())} of {excess.numel()} beyond the bound, worst at {at}: got {float(got[at]):.6g}, "
        f"expected {float(want[at]):.6g} ± {float(bound[at]):.2g}"
    )
