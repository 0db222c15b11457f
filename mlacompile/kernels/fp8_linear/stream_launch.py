"""Chooses stretches of the weight for the Hopper kernel of ``fp8_linear`` for few rows, and launches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels.fp8_linear.hopper_launch import GROUP_ROWS, RESERVED, SMEM, aligned, descriptor
from mlacompile.kernels.fp8_linear.launch import Launch, sms_of
from mlacompile.kernels.mla_decode.supports import chains

COLUMNS = 128  # of a tile of the result
REGISTERS = 184  # of a thread of the second group: 64 sums, as many of one block, and addresses
SUM_ROWS = 16  # whose pieces a program adds up
CUT_BLOCKS = 8  # what cutting takes, in blocks of a stretch: pieces are written, and added up by a second launch


@dataclass(frozen=True)
class StreamTiles:
    """block_m: 64 or 128, no fewer than rows of x. whole: stretches are whole tiles, and nothing is cut."""

    block_m: int
    whole: bool = False

    @property
    def stages(self) -> int:
        """As many as fit beside what leaves."""
        room = SMEM - RESERVED - self.block_m * COLUMNS * 2
        return room // ((self.block_m + COLUMNS) * SCALE_GROUP)

    def share(self, n: int, k: int, sms: int) -> int:
        """Blocks of the line that a program takes."""
        tiles, blocks = -(-n // COLUMNS), scale_groups(k)
        return -(-tiles // sms) * blocks if self.whole else -(-tiles * blocks // sms)

    def __str__(self) -> str:
        return f"{self.block_m}{' whole' * self.whole}"


def choose_stream_tiles(m: int, n: int, k: int, sms: int) -> StreamTiles:
    """Tiles for up to 128 rows. Whole ones where cutting them would cost more than it evens out."""
    cut = StreamTiles(GROUP_ROWS if m <= GROUP_ROWS else 2 * GROUP_ROWS)
    whole = StreamTiles(cut.block_m, whole=True)
    return whole if whole.share(n, k, sms) <= cut.share(n, k, sms) + CUT_BLOCKS else cut


def fp8_linear_stream(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype,
    tiles: StreamTiles | None = None,
) -> Tensor:  # fmt: skip
    """The op by the Hopper kernel for few rows, for inputs that ``stream_reasons`` has nothing against."""
    return fp8_stacked_stream(x, x_descale, [weight], [weight_descale], dtype, tiles)


def fp8_stacked_stream(
    x: Tensor, x_descale: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor], dtype: torch.dtype,
    tiles: StreamTiles | None = None,
) -> Tensor:  # fmt: skip
    """As above, by one weight or two."""
    weights = [aligned(w) for w in weights]
    out = x.new_empty((x.shape[0], sum(w.shape[0] for w in weights)), dtype=dtype)
    for launch in stream_launches(aligned(x), x_descale, weights, descales, out, tiles):
        launch()
    return out


def stream_launches(
    x: Tensor, x_descale: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor], out: Tensor,
    tiles: StreamTiles | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of the kernel, and of the sum if tiles are cut. Meta tensors do, to compile without a GPU."""
    from mlacompile.kernels.fp8_linear.stream import _fp8_cut_kernel, _fp8_stream_kernel

    (m, k), n = x.shape, out.shape[1]
    sms = sms_of(x.device)
    tiles = tiles or choose_stream_tiles(m, n, k, sms)
    share, blocks = tiles.share(n, k, sms), scale_groups(k)
    programs = -(-(-(-n // COLUMNS) * blocks) // share)
    pieces = x.new_empty((programs, 2, tiles.block_m, COLUMNS), dtype=torch.float32) if share % blocks else None
    pdl = chains(x.device)
    common = {"M": m, "N": n, "K": k, "share": share, "BLOCK_M": tiles.block_m}
    arguments = {
        "d_x": descriptor(x, tiles.block_m, SCALE_GROUP), "p_x_descale": x_descale,
        "d_w": descriptor(weights[0], COLUMNS, SCALE_GROUP), "p_descale": descales[0],
        "d_w2": descriptor(weights[-1], COLUMNS, SCALE_GROUP), "p_descale2": descales[-1],
        "d_out": descriptor(out, GROUP_ROWS, COLUMNS), "p_part": pieces, "N1": weights[0].shape[0],
        "stride_xsm": x_descale.stride(0), "stride_xsk": x_descale.stride(1), "stride_sn": descales[0].stride(0),
        "stride_sn2": descales[-1].stride(0), "STAGES": tiles.stages, "REGS": REGISTERS, "TWO": len(weights) == 2,
        **common,
    }  # fmt: skip
    options = {"num_warps": 4, **({"launch_pdl": True} if pdl else {})}
    launches = [Launch(_fp8_stream_kernel, (programs,), arguments, options)]
    if pieces is not None:
        sums = {"p_part": pieces, "p_out": out, "SOME": SUM_ROWS, "PDL": pdl, **common}
        launches.append(Launch(_fp8_cut_kernel, (programs - 1, -(-m // SUM_ROWS)), sums, options))
    return launches
