"""Chooses tiles for the Hopper kernel of ``fp8_linear`` for few rows, and stretches of their blocks, and launches it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels.fp8_linear.hopper_launch import GROUP_ROWS, RESERVED, SMEM, aligned, descriptor
from mlacompile.kernels.fp8_linear.launch import Launch, sms_of
from mlacompile.kernels.mla_decode.supports import chains

COLUMNS = 128  # of the result that a group of warps sums
REGISTERS = 184  # of a thread of the second group: 64 sums, as many of one block, and addresses
SUM_ROWS = 16  # that a program adds up
CUT_BLOCKS = 4  # what adding up pieces takes, in blocks of a stretch


@dataclass(frozen=True)
class StreamTiles:
    """block_m: 64 or 128, no fewer than rows of x. block_n: rows of the weight, 128, or 256 with 64 rows of x.
    whole: programs take whole tiles, and nothing is cut."""

    block_m: int
    block_n: int
    whole: int = 0

    @property
    def stages(self) -> int:
        """As many as fit beside what leaves."""
        room = SMEM - RESERVED - self.block_m * self.block_n * 2
        return room // ((self.block_m + self.block_n) * SCALE_GROUP)

    def share(self, n: int, k: int, sms: int) -> int:
        """Blocks of the line that a program takes."""
        tiles, blocks = -(-n // self.block_n), scale_groups(k)
        return -(-tiles // sms) * blocks if self.whole else -(-tiles * blocks // sms)

    def cut(self, n: int, k: int, sms: int) -> bool:
        """Whether tiles are cut."""
        return self.share(n, k, sms) % scale_groups(k) != 0

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}{' whole' * self.whole}"


def choose_stream_tiles(m: int, n: int, k: int, sms: int) -> StreamTiles:
    """Tiles for up to 128 rows. Whole ones where cutting them would cost more than it evens out."""
    even = StreamTiles(GROUP_ROWS if m <= GROUP_ROWS else 2 * GROUP_ROWS, COLUMNS)
    whole = StreamTiles(even.block_m, even.block_n, 1)
    return whole if whole.share(n, k, sms) <= even.share(n, k, sms) + CUT_BLOCKS else even


def fp8_linear_stream(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype,
    tiles: StreamTiles | None = None,
) -> Tensor:  # fmt: skip
    """The op by the Hopper kernel for few rows, for inputs that ``stream_reasons`` has nothing against."""
    x, weight = aligned(x), aligned(weight)
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    for launch in stream_launches(x, x_descale, weight, weight_descale, out, tiles):
        launch()
    return out


def stream_launches(
    x: Tensor, x_descale: Tensor, weight: Tensor, weight_descale: Tensor, out: Tensor,
    tiles: StreamTiles | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of the kernel, and of the sum if tiles are cut. Meta tensors do, to compile without a GPU."""
    from mlacompile.kernels.fp8_linear.stream import _fp8_cut_kernel, _fp8_stream_kernel

    (m, k), n = x.shape, weight.shape[0]
    sms = sms_of(x.device)
    tiles = tiles or choose_stream_tiles(m, n, k, sms)
    share, cut = tiles.share(n, k, sms), tiles.cut(n, k, sms)
    programs = -(-(-(-n // tiles.block_n) * scale_groups(k)) // share)
    pieces = x.new_empty((programs, 2, tiles.block_m, tiles.block_n), dtype=torch.float32) if cut else None
    pdl = chains(x.device)
    common = {"M": m, "N": n, "K": k, "share": share, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
    arguments = {
        "d_x": descriptor(x, tiles.block_m, SCALE_GROUP), "p_x_descale": x_descale,
        "d_w": descriptor(weight, tiles.block_n, SCALE_GROUP), "p_descale": weight_descale,
        "d_out": descriptor(out, GROUP_ROWS, COLUMNS), "p_part": pieces,
        "stride_xsm": x_descale.stride(0), "stride_xsk": x_descale.stride(1), "stride_sn": weight_descale.stride(0),
        "STAGES": tiles.stages, "REGS": REGISTERS, **common,
    }  # fmt: skip
    chained = {"launch_pdl": True} if pdl else {}
    launches = [Launch(_fp8_stream_kernel, (programs,), arguments, {"num_warps": 4, **chained})]
    if pieces is None:
        return launches
    sums = {"p_part": pieces, "p_out": out, "SOME": SUM_ROWS, "PDL": pdl, **common}
    grid = (programs - 1, -(-m // SUM_ROWS))
    return [*launches, Launch(_fp8_cut_kernel, grid, sums, {"num_warps": 4, **chained})]
