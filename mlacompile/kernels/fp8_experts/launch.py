"""Chooses tiles for ``fp8_experts``, brings its rows into the order of their experts and launches it, all on the
device: a CUDA graph replays whatever the router chooses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlacompile.kernels.fp8_linear.launch import descriptor, power
from mlacompile.kernels.launch import Launch

BLOCK_N = 64  # rows of a weight: two tiles share a scale
COUNTED_ROWS = 4096  # up to here every row is compared with every other; more are sorted
COUNTED_AT_ONCE = 32  # by one program


@dataclass(frozen=True)
class ExpertTiles:
    """block_m: rows of one expert that a program multiplies, at most."""

    block_m: int
    warps: int = 4
    stages: int = 4


def choose_expert_tiles(m: int, experts: int) -> ExpertTiles:
    """Tiles for m rows that so many experts share: of up to 128 rows, and about twice as many as one of them has, or
    half of them would have a few rows beyond a tile, and the weight be read twice (measured, docs/kernels.md)."""
    block_m = min(128, max(16, power(-(-2 * m // experts))))
    return ExpertTiles(block_m, stages=4 if block_m <= 64 else 3)


def in_order(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their experts, int32 ``[M]``, and where those of each begin among them, int32 ``[E + 1]``.

    Rows of no expert come before the first beginning or behind the last.
    """
    if 0 < len(expert) <= COUNTED_ROWS:
        order = expert.new_empty(len(expert), dtype=torch.int32)
        starts = expert.new_empty(experts + 1, dtype=torch.int32)
        order_launch(expert, order, starts)()
        return order, starts
    ordered, order = expert.sort()
    starts = torch.searchsorted(ordered, torch.arange(experts + 1, device=expert.device, dtype=expert.dtype))
    return order.to(torch.int32), starts.to(torch.int32)


def order_launch(expert: Tensor, order: Tensor, starts: Tensor) -> Launch:
    """The launch that fills order and starts. Meta tensors do, to compile without a GPU."""
    from mlacompile.kernels.fp8_experts.order import _expert_order_kernel

    m, experts = len(order), len(starts) - 1
    grid = (-(-m // COUNTED_AT_ONCE) + -(-(experts + 1) // COUNTED_AT_ONCE),)
    arguments = {
        "p_expert": expert.contiguous(), "p_order": order, "p_starts": starts, "M": m, "E": experts,
        "SOME": COUNTED_AT_ONCE, "STEP": 128,
    }  # fmt: skip
    return Launch(_expert_order_kernel, grid, arguments, {"num_warps": 4})


def fp8_experts_triton(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, expert: Tensor, dtype: torch.dtype,
    tiles: ExpertTiles | None = None,
) -> Tensor:  # fmt: skip
    """The op by the Triton kernel, for inputs that ``experts_reasons`` has nothing against."""
    out = x.new_zeros((x.shape[0], weight.shape[1]), dtype=dtype)
    if out.numel():
        order, starts = in_order(expert, weight.shape[0])
        experts_launch(x, x_descale, weight, weight_descale, order, starts, out, tiles)()
    return out


def experts_launch(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, order: Tensor, starts: Tensor, out: Tensor,
    tiles: ExpertTiles | None = None,
) -> Launch:  # fmt: skip
    """The launch, with as many programs as there can be tiles of rows: rows of each expert may end in one that is not
    full. Meta tensors do, to compile without a GPU."""
    from mlacompile.kernels.fp8_experts.portable import _fp8_experts_kernel

    (m, k), (experts, n, _) = x.shape, weight.shape
    tiles = tiles or choose_expert_tiles(m, experts)
    arguments = {
        "p_x": x.view(torch.uint8), "p_x_descale": x_descale, "d_w": descriptor(weight, BLOCK_N),
        "p_descale": weight_descale, "p_order": order, "p_starts": starts, "p_out": out,
        "N": n, "K": k, "E": experts, "stride_xm": x.stride(0), "stride_xsm": x_descale.stride(0),
        "stride_xsk": x_descale.stride(1), "stride_se": weight_descale.stride(0),
        "stride_sn": weight_descale.stride(1), "BLOCK_M": tiles.block_m, "BLOCK_N": BLOCK_N,
        "EXPERTS": power(experts), "STAGES": tiles.stages, "EXACT": out.dtype == torch.float32,
    }  # fmt: skip
    grid = (-(-n // BLOCK_N), m // tiles.block_m + min(m, experts))
    return Launch(_fp8_experts_kernel, grid, arguments, {"num_warps": tiles.warps})
