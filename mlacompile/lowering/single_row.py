"""Products with one row: decoding one sequence reads every weight once to use it once.

Such a product is a reduction, and Inductor's reductions, tuned by coordinate descent, reach memory bandwidth and take the norm or the
gate before them along. They win where the weight has at least as many output rows as it is long; a long reduction to few outputs is
better cut into pieces, which is what cuBLAS does, and so are the batched absorbed products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def has_single_row_products(gm: GraphModule) -> bool:
    """Whether any matrix product on a CUDA device has exactly one row."""
    return any(_is_single_row(n) for n in gm.graph.find_nodes(op="call_function", target=aten.mm.default))


def _is_single_row(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.device.type == "cuda" and _static_one(value.shape[0])


def _static_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def patches() -> dict[str, Any]:
    """Inductor settings for a graph with such products."""
    return {"coordinate_descent_tuning": True}


def decompositions() -> dict[Any, Any]:
    """Inductor's table, with one-row products as reductions where those are faster."""
    from torch._inductor.decomposition import select_decomp_table

    return {**select_decomp_table(), aten.mm.default: _mm, aten.bmm.default: _bmm}


def _mm(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    k, n = weight.shape
    static = isinstance(k, int) and isinstance(n, int)
    if out_dtype is None and _static_one(x.shape[0]) and static and n >= k:
        return (x.unsqueeze(2) * weight.unsqueeze(0)).sum(dim=1)
    return NotImplemented


def _bmm(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return NotImplemented
