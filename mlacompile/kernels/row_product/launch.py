"""Chooses tiles for ``row_product`` and launches it; for FP8 weights by the kernel of ``fp8_linear``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mlacompile.kernels.device import chains
from mlacompile.kernels.fp8_linear.launch import RowTiles, rows_launch
from mlacompile.kernels.row_product.portable import _row_product_kernel


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a step, and warps of a program."""

    block_n: int
    block_k: int
    num_warps: int


def choose_tiles(n: int, k: int, *, norm: bool = False, gate: bool = False) -> Tiles:
    """Tiles by measurement on an H200, with a norm or a gate on an H100 (docs/kernels.md): long rows in long steps, few
    rows in small programs. With a gate half of ``block_n`` are rows of each weight."""
    if k >= 8192:
        return Tiles(4, 2048, 4)
    if k < 2048:
        return Tiles(2, 512, 2)
    if n < 1024:
        return Tiles(1, 2048, 8)
    if n < 4096:
        return Tiles(2, 1024, 4)
    if gate:
        return Tiles(4, 512, 4)
    return Tiles(2, 1024, 4) if norm else Tiles(4, 1024, 4 if n < 8192 else 2)


def row_product_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    norm: Tensor | None = None,
    added: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: str = "",
    early: bool = False,
    tiles: Tiles | None = None,
) -> list[Tensor]:
    """``row_product`` by the Triton kernel, for inputs that ``triton_reasons`` has nothing against."""
    out = [x.new_empty(1, w.shape[0]) for w in (weights[:1] if gate else weights)]
    early = early and chains(x.device)
    for i in range(0, len(weights), 2):
        grid, arguments, options = launch(
            x, weights[i : i + 2], out[i : i + 2], norm, added, eps, gate, tiles, early=early
        )
        _row_product_kernel[grid](**arguments, **options)
    return out


def row_product_fp8(
    x: Tensor,
    weights: Sequence[Tensor],
    descales: Sequence[Tensor],
    norm: Tensor | None = None,
    added: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: str = "",
    tiles: RowTiles | None = None,
) -> list[Tensor]:
    """``row_product`` by the kernel for FP8 weights, for inputs that ``fp8_reasons`` has nothing against."""
    out = [x.new_empty(1, w.shape[0]) for w in (weights[:1] if gate else weights)]
    for i in range(0, len(weights), 2):
        pair = weights[i : i + 2], descales[i : i + 2], out[i : i + 2]
        rows_launch(x, None, *pair, tiles, norm=norm, added=added, eps=eps, gate=gate)()
    return out


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    norm: Tensor | None = None,
    added: Tensor | None = None,
    eps: float = 0.0,
    gate: str = "",
    tiles: Tiles | None = None,
    *,
    early: bool = False,
) -> tuple[tuple[int], dict[str, Any], dict[str, Any]]:
    """Grid, arguments and options of one launch for one or two weights. Meta tensors do, to compile without a GPU."""
    rows, k = [w.shape[0] for w in weights], x.shape[1]
    tiles = tiles or choose_tiles(sum(rows), k, norm=norm is not None, gate=bool(gate))
    if gate:  # a program reads as many rows, half of each weight
        tiles, rows = replace(tiles, block_n=max(1, tiles.block_n // 2)), rows[:1]
    arguments = {
        "p_x": x, "p_g": norm, "p_added": added, "K": k, "eps": eps,
        "p_w": weights[0], "p_out": out[0], "N": rows[0], "stride_wn": weights[0].stride(0),
        "p_w2": weights[-1], "p_out2": out[-1], "N2": rows[-1], "stride_wn2": weights[-1].stride(0),
        "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "EVEN_K": k % tiles.block_k == 0,
        "TWO": len(rows) == 2, "GATE": gate, "EARLY": early,
    }  # fmt: skip
    options = {"num_warps": tiles.num_warps, **({"launch_pdl": True} if early else {})}
    return (sum(-(-n // tiles.block_n) for n in rows),), arguments, options
