"""Experts in FP8 on inputs that try to break them: experts with no rows, with most, and rows of no expert."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.ops.fp8_experts import fp8_experts
from mlacompile.testing.scaled import Product, exact, make_product, worst

#: rows, weight rows, columns, experts
SHAPES = [(7, 200, 272, 5), (40, 130, 144, 3), (1, 64, 128, 9), (33, 256, 512, 1), (300, 192, 384, 4)]


def disagreement(
    m: int, n: int, k: int, experts: int, kind: str, dtype: torch.dtype, device: str = "cpu", impl: str = "triton"
) -> str:
    """Where a kernel is farther from float64 than ``fp8_linear`` may be for the same row and weight, in words."""
    product = make_product(m, n, k, quantized=True, kind=kind, device=device)
    several = [make_product(1, n, k, quantized=True, kind=kind, device=device, seed=e) for e in range(experts)]
    weight = torch.stack([one.weight.view(torch.uint8) for one in several]).view(product.weight.dtype)
    descale = torch.stack([one.weight_descale for one in several])
    expert = _experts(m, experts).to(device)
    assert product.x_descale is not None
    got = fp8_experts(product.x, product.x_descale, weight, descale, expert, dtype, impl=impl)
    for e in range(-1, experts + 1):
        rows = (expert == e).nonzero().squeeze(1)
        if not 0 <= e < experts:
            if bool(got[rows].any()):
                return f"rows of expert {e} of {experts} are not zero"
            continue
        x = product.x.view(torch.uint8)[rows].view(product.x.dtype)
        if wrong := worst(got[rows], *exact(Product(x, product.x_descale[rows], weight[e], descale[e]), dtype)):
            return f"expert {e}: {wrong}"
    return ""


def disorder(m: int, experts: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> str:
    """Where rows are not in the order of their experts, each as it came, or an expert does not begin where it does."""
    from mlacompile.kernels.fp8_experts.launch import in_order

    expert = _experts(m, experts).to(device, dtype)
    order, starts = in_order(expert, experts)
    if not torch.equal(order.long(), expert.sort(stable=True).indices):
        return f"{m} rows of {experts} experts: {order.tolist()} for {expert.tolist()}"
    begins = (expert[None, :] < torch.arange(experts + 1, device=device)[:, None]).sum(1)
    return "" if torch.equal(starts.long(), begins) else f"experts begin at {starts.tolist()}, not {begins.tolist()}"


def _experts(m: int, experts: int) -> Tensor:
    """Half of the rows have the first expert, the others any or none."""
    chosen = torch.randint(-1, experts + 1, (m,), generator=torch.Generator().manual_seed(m))
    chosen[::2] = 0
    return chosen
