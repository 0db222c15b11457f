"""Chooses tiles for ``fp8_linear`` and launches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mlacompile.geometry import SCALE_GROUP
from mlacompile.kernels.device import chains, sms_of
from mlacompile.kernels.drop import in_whole_lines
from mlacompile.kernels.launch import Launch, chained

SUM_BLOCK = 1024


@dataclass(frozen=True)
class RowTiles:
    """Of the kernel for few rows. rows: of each weight, a thread. width: columns of a piece. lanes, warps_k: threads of
    a warp, and warps, that divide K among themselves. unroll: pieces a thread and step."""

    rows: int
    width: int
    lanes: int
    warps: int
    warps_k: int
    unroll: int = 1

    @property
    def block_n(self) -> int:
        """Weight rows of a program."""
        return self.rows * (32 // self.lanes) * (self.warps // self.warps_k)

    @property
    def step(self) -> int:
        """Columns of a step."""
        return self.width * self.lanes * self.warps_k * self.unroll


@dataclass(frozen=True)
class Tiles:
    """Of the kernel for any number of rows. parts: of K, each with programs of its own."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    parts: int = 1


def choose_row_tiles(m: int, n: int, k: int, *, norm: bool = False, gate: bool = False) -> RowTiles:
    """Tiles for m rows by weights of n rows in all and k columns, by measurement on an H200, for two rows on an H100
    (docs/kernels.md): few rows in many warps, so that all of them are read at once."""
    if m > 1:
        lanes = min(32, power(k // 8))
        return RowTiles(4, 8, lanes, 1, 1) if k < 2048 else RowTiles(4, 8, lanes, 4, 4)
    if k <= 512:
        return RowTiles(4, 16, min(16, power(k // 16)), 2, 1)
    if k < 2048:
        return RowTiles(4, 16, min(32, power(k // 16)), 1, 1)
    if gate:
        return RowTiles(2, 16, 32, 2, 2)
    if n >= 4096:
        return RowTiles(4, 16, 32, 2, 2, unroll=1 if norm else 2)
    if k >= 4096:
        return RowTiles(4, 16, 32, 8, 8)
    return RowTiles(4 if n >= 3072 else 2, 16, 32, 4, 4)


def choose_tiles(m: int, n: int, k: int, heads: int, sms: int) -> Tiles:
    """Tiles for m rows by [n, k], one weight or one a head, by measurement on an H200 (docs/kernels.md).

    K is divided where there are fewer tiles than fit on the device at once: with up to 16 rows of x five an SM, with
    more one, which then has the shared memory for itself. Sums of few blocks, as heads have, are sent for all at once.
    """
    block_m = min(128, max(16, power(m)))
    block_n = 128 if block_m == 64 and heads == 1 and n >= 4096 else 64
    room = 5 * sms if block_m == 16 else sms
    programs = -(-n // block_n) * -(-m // block_m) * heads
    parts = 1
    while heads == 1 and programs * parts * 2 <= room and k // (parts * 2) >= 8 * SCALE_GROUP:
        parts *= 2
    if k <= 4 * SCALE_GROUP:
        stages = -(-k // SCALE_GROUP) if block_m == 64 else 3
    elif block_m == 16:
        stages = 4
    else:
        stages = 3 if programs * parts > sms else 5
    return Tiles(block_m, block_n, 4, stages, parts)


def power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def fp8_linear_rows(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype,
    tiles: RowTiles | None = None,
) -> Tensor:  # fmt: skip
    """The op by the kernel for few rows, for inputs that ``rows_reasons`` has nothing against."""
    out = x.new_empty((*x.shape[:-1], weight.shape[-2]), dtype=dtype)
    rows_launch(x, x_descale, [weight], [weight_descale], [out], tiles)()
    return out


def fp8_linear_tiles(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """The op by the kernels for any number of rows, for inputs that ``tiles_reasons`` has nothing against."""
    return fp8_stacked_tiles(x, x_descale, [weight], [weight_descale], dtype, tiles)


def fp8_stacked_tiles(
    x: Tensor, x_descale: Tensor | None, weights: Sequence[Tensor], descales: Sequence[Tensor], dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """As above, by one weight or two."""
    out = x.new_empty((*x.shape[:-1], sum(w.shape[-2] for w in weights)), dtype=dtype)
    for launch in tiles_launches(x, x_descale, weights, descales, out, tiles):
        launch()
    return out


def rows_launch(
    x: Tensor, x_descale: Tensor | None, weights: Sequence[Tensor], descales: Sequence[Tensor], out: Sequence[Tensor],
    tiles: RowTiles | None = None, *, norm: Tensor | None = None, added: Tensor | None = None, eps: float = 0.0,
    gate: str = "",
) -> Launch:  # fmt: skip
    """The launch of the kernel for few rows, for one or two weights, with what stands around them as in
    ``row_product``. Meta tensors do, to compile without a GPU."""
    from mlacompile.kernels.fp8_linear.rows import _fp8_rows_kernel

    m, k = x.shape[-2:]
    rows = [w.shape[-2] for w in weights]
    tiles = tiles or choose_row_tiles(m, sum(rows), k, norm=norm is not None, gate=bool(gate))
    if gate:
        rows = rows[:1]
    (xb, xm, _), (xsb, xsm, xsk), (wb, wn, _), (sb, sn, _) = map(
        _three_strides, (x, x_descale, weights[0], descales[0])
    )
    arguments = {
        "p_x": x, "p_x_descale": x_descale, "p_w": weights[0], "p_descale": descales[0], "p_out": out[0],
        "M": m, "N": rows[0], "K": k, "stride_xb": xb, "stride_xm": xm,
        "stride_xsb": xsb, "stride_xsm": xsm, "stride_xsk": xsk,
        "stride_wb": wb, "stride_wn": wn, "stride_sb": sb, "stride_sn": sn,
        "p_w2": weights[-1], "p_descale2": descales[-1], "p_out2": out[-1], "N2": rows[-1],
        "stride_wn2": weights[-1].stride(-2), "stride_sn2": descales[-1].stride(-2),
        "p_g": norm, "p_added": added, "eps": eps,
        "ROWS": power(m), "ROWS_A_THREAD": tiles.rows, "WIDTH": tiles.width, "LANES": tiles.lanes,
        "WARPS_K": tiles.warps_k, "UNROLL": tiles.unroll, "EVEN_K": k % tiles.step == 0, "TWO": len(rows) == 2,
        "GATE": gate,
    }  # fmt: skip
    grid = (sum(-(-n // tiles.block_n) for n in rows), weights[0].shape[0] if weights[0].dim() == 3 else 1)
    return Launch(_fp8_rows_kernel, grid, arguments, {"num_warps": tiles.warps})


def tiles_launches(
    x: Tensor, x_descale: Tensor | None, weights: Sequence[Tensor], descales: Sequence[Tensor], out: Tensor,
    tiles: Tiles | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of the kernel for any number of rows, and of the sum if K is divided."""
    from mlacompile.kernels.fp8_linear.tiles import _fp8_tiles_kernel

    weight, (m, k), n = weights[0], x.shape[-2:], out.shape[-1]
    heads = weight.shape[0] if weight.dim() == 3 else 1
    tiles = tiles or choose_tiles(m, n, k, heads, sms_of(x.device))
    groups = -(-k // SCALE_GROUP)
    part = -(-groups // tiles.parts) * SCALE_GROUP
    parts = -(-k // part)
    split = parts > 1
    target = x.new_empty((parts, m, n), dtype=torch.float32) if split else out
    by_head = weight.dim() == 3
    (xsb, xsm, xsk), (sb, sn, _), (_, sn2, _) = map(_three_strides, (x_descale, descales[0], descales[-1]))
    arguments = {
        "d_x": descriptor(x, tiles.block_m), "p_x_descale": x_descale,
        "d_w": descriptor(weight, tiles.block_n), "p_descale": descales[0],
        "d_w2": descriptor(weights[-1], tiles.block_n), "p_descale2": descales[-1], "p_out": target,
        "M": m, "N": n, "N1": weight.shape[-2], "K": k, "K_PART": part,
        "stride_xsb": xsb, "stride_xsm": xsm, "stride_xsk": xsk, "stride_sb": sb,
        "stride_sn": sn, "stride_sn2": sn2, "stride_ob": m * n, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BY_HEAD": by_head, "SPLIT": split, "STAGES": tiles.stages, "TWO": len(weights) == 2, "PDL": chains(out.device),
        "EXACT": out.dtype == torch.float32,
    }  # fmt: skip
    grid = (-(-n // tiles.block_n), -(-m // tiles.block_m), parts if split else heads)
    options = {"num_warps": tiles.warps, **chained(out.device)}
    launches = [Launch(_fp8_tiles_kernel, grid, arguments, options)]
    return [*launches, sum_launch(target, out)] if split else launches


def sum_launch(partial: Tensor, out: Tensor) -> Launch:
    """The launch that adds parts ``[parts, m, n]`` in float32, which nobody else reads, up to out."""
    from mlacompile.kernels.fp8_linear.tiles import _fp8_sum_kernel

    flat = partial.flatten(1)
    arguments = {
        "p_part": partial, "p_out": out, "SIZE": out.numel(), "PARTS": partial.shape[0], "BLOCK": SUM_BLOCK,
        "PDL": chains(out.device), "DROP": in_whole_lines(flat), "THREADS": 128,
    }  # fmt: skip
    options = {"num_warps": 4, **chained(out.device)}
    return Launch(_fp8_sum_kernel, (-(-out.numel() // SUM_BLOCK),), arguments, options)


def _three_strides(t: Tensor | None) -> list[int]:
    return [0, 0, 0] if t is None else [0] * (3 - t.dim()) + list(t.stride())


def descriptor(t: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of so many rows and 128 columns of ``[(H,) rows, K]``."""
    unit = 16 // t.itemsize  # strides come in whole 16 bytes, of dimensions with a single element too
    strides = [s if s % unit == 0 else unit for s in t.stride()[:-1]] + [1]
    return TensorDescriptor(t, list(t.shape), strides, [1] * (t.dim() - 2) + [rows, SCALE_GROUP])
