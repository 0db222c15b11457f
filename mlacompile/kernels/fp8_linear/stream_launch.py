"""Chooses tiles for the Hopper kernel of ``fp8_linear`` for few rows, and stretches of the weight, and launches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels.flags import flags
from mlacompile.kernels.fp8_linear.hopper_launch import GROUP_ROWS, RESERVED, SMEM, aligned, descriptor
from mlacompile.kernels.fp8_linear.launch import Launch, sms_of
from mlacompile.kernels.mla_decode.supports import chains

COLUMNS = 128  # of the result that a group of warps sums
REGISTERS = 184  # of a thread of the second group: 64 sums, as many of one block, and addresses
CUT_BLOCKS = 8  # what adding up pieces takes, in blocks of a stretch


@dataclass(frozen=True)
class StreamTiles:
    """block_m: 64 or 128, no fewer than rows of x. block_n: rows of the weight, 128, or 256 with 64 rows of x.
    whole: programs take whole tiles, and nothing is cut."""

    block_m: int
    block_n: int
    whole: int = 0

    @property
    def groups(self) -> int:
        """Groups of warps that multiply."""
        return self.block_m * self.block_n // (GROUP_ROWS * COLUMNS)

    @property
    def stages(self) -> int:
        """As many as fit beside what leaves."""
        room = SMEM - RESERVED - self.block_m * self.block_n * 2
        return room // ((self.block_m + self.block_n) * SCALE_GROUP)

    def share(self, n: int, k: int, sms: int) -> int:
        """Blocks of the line that a program takes."""
        tiles, blocks = -(-n // self.block_n), scale_groups(k)
        return -(-tiles // sms) * blocks if self.whole else -(-tiles * blocks // sms)

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
    return fp8_stacked_stream(x, x_descale, [weight], [weight_descale], dtype, tiles)


def fp8_stacked_stream(
    x: Tensor, x_descale: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor], dtype: torch.dtype,
    tiles: StreamTiles | None = None,
) -> Tensor:  # fmt: skip
    """As above, by one weight or two."""
    weights = [aligned(w) for w in weights]
    out = x.new_empty((x.shape[0], sum(w.shape[0] for w in weights)), dtype=dtype)
    stream_launch(aligned(x), x_descale, weights, descales, out, tiles)()
    return out


def stream_launch(
    x: Tensor, x_descale: Tensor, weights: Sequence[Tensor], descales: Sequence[Tensor], out: Tensor,
    tiles: StreamTiles | None = None,
) -> Launch:  # fmt: skip
    """The launch of the kernel. Meta tensors do, to compile without a GPU."""
    from mlacompile.kernels.fp8_linear.stream import _fp8_stream_kernel

    (m, k), n = x.shape, out.shape[1]
    sms = sms_of(x.device)
    tiles = tiles or choose_stream_tiles(m, n, k, sms)
    share = tiles.share(n, k, sms)
    programs = -(-(-(-n // tiles.block_n) * scale_groups(k)) // share)
    arguments = {
        "d_x": descriptor(x, tiles.block_m, SCALE_GROUP), "p_x_descale": x_descale,
        "d_w": descriptor(weights[0], tiles.block_n, SCALE_GROUP), "p_descale": descales[0],
        "d_w2": descriptor(weights[-1], tiles.block_n, SCALE_GROUP), "p_descale2": descales[-1],
        "d_out": descriptor(out, GROUP_ROWS, COLUMNS),
        "p_part": x.new_empty((programs, tiles.groups, GROUP_ROWS, COLUMNS), dtype=torch.float32),
        "p_flag": flags(x.device, programs * tiles.groups), "M": m, "N": n, "N1": weights[0].shape[0], "K": k,
        "stride_xsm": x_descale.stride(0), "stride_xsk": x_descale.stride(1), "stride_sn": descales[0].stride(0),
        "stride_sn2": descales[-1].stride(0), "share": share, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "STAGES": tiles.stages, "REGS": REGISTERS, "TWO": len(weights) == 2,
    }  # fmt: skip
    options = {"num_warps": 4, **({"launch_pdl": True} if chains(x.device) else {})}
    return Launch(_fp8_stream_kernel, (programs,), arguments, options)
