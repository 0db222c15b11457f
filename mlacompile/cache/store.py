"""Memory for the latents and rotary keys of one layer: allocated once, written in place, at addresses that never move.

    write(slots, c_kv, k_pe)     c_kv [B, S, R], k_pe [B, S, P] → the rows ``slots`` of every sequence
    read() → c_kv, k_pe          [B, T, R], [B, T, P], in the dtype that the model computes in

A store says nothing about which rows are in use: that is for whoever holds its length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP, KVLayout, scale_groups
from mlacompile.ops.fp8_quantize import fp8_dequantize, fp8_quantize


class LatentStore(ABC):
    """Arrays ``[B, T, …]`` that hold the latents of one layer.

    Attributes:
        layout: bytes of a token. rank, rope: values in a latent and a rotary key. compute: dtype that ``read`` returns.
    """

    layout: KVLayout

    def __init__(self, rank: int, rope: int, compute: torch.dtype) -> None:
        self.rank, self.rope, self.compute = rank, rope, compute

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """The arrays by name; each has the batch first and the tokens second."""

    @abstractmethod
    def write(self, slots: Tensor, c_kv: Tensor, k_pe: Tensor) -> None:
        """Write tokens in place: slots int64 ``[S]``, c_kv ``[B, S, R]``, k_pe ``[B, S, P]``."""

    @abstractmethod
    def read(self) -> tuple[Tensor, Tensor]:
        """All rows, in use or not: c_kv ``[B, T, R]``, k_pe ``[B, T, P]``. Views of the memory where dtypes allow."""

    def _tensors(self) -> Iterator[Tensor]:
        return iter(self.arrays().values())

    def pin(self) -> None:
        """Tell the compiler that these addresses stay, without which CUDA graphs would refuse to write to them."""
        for array in self._tensors():
            torch._dynamo.mark_static_address(array)

    def clear(self) -> None:
        """Zero everything, in place."""
        for array in self._tensors():
            array.zero_()

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was, in place; the batch keeps its size."""
        for array in self._tensors():
            array.copy_(array.index_select(0, rows.to(array.device)))

    def rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every array by ``change(array)``, which may alter the batch: addresses change with it."""
        for name, array in self.arrays().items():
            setattr(self, name, change(array).contiguous())


class PlainStore(LatentStore):
    """Latent and rotary key beside each other in one array ``[B, T, R + P]`` of one floating point dtype."""

    def __init__(
        self,
        batch: int,
        tokens: int,
        rank: int,
        rope: int,
        *,
        storage: torch.dtype,
        compute: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(rank, rope, compute)
        self.layout = plain_layout(rank, rope, storage)
        self.tokens = torch.zeros(batch, tokens, rank + rope, dtype=storage, device=device)

    def arrays(self) -> dict[str, Tensor]:
        return {"tokens": self.tokens}

    def write(self, slots: Tensor, c_kv: Tensor, k_pe: Tensor) -> None:
        self.tokens.index_copy_(1, slots, torch.cat((c_kv, k_pe), dim=-1).to(self.tokens.dtype))

    def read(self) -> tuple[Tensor, Tensor]:
        tokens = self.tokens.to(self.compute)
        return tokens[..., : self.rank], tokens[..., self.rank :]


def plain_layout(rank: int, rope: int, storage: torch.dtype) -> KVLayout:
    """Bytes of a token that is kept in one floating point dtype."""
    name = str(storage).removeprefix("torch.")
    return KVLayout(name, rank * storage.itemsize, rope * storage.itemsize)


class ScaledStore(LatentStore):
    """FP8 latents with float32 scales, and rotary keys in a wider dtype (or in FP8, with a scale of their own).

    What a rotary key loses is lost for every head and every distance, and one large value of it would take the range
    of the latent beside it: so it never shares a scale with the latent.
    """

    def __init__(
        self, layout: KVLayout, rank: int, rope: int, *, fp8: torch.dtype, rope_dtype: torch.dtype, compute: torch.dtype
    ) -> None:
        super().__init__(rank, rope, compute)
        self.layout, self.fp8, self.rope_dtype = layout, fp8, rope_dtype
        self.group = SCALE_GROUP if layout.scale_at is not None else rank
        self.groups = scale_groups(rank, self.group)

    def _quantized(self, c_kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """FP8 latents, all scales, and rotary keys as they are stored."""
        q, descale = fp8_quantize(c_kv, self.group, self.fp8)
        if self.rope_dtype != self.fp8:
            return q, descale, k_pe.to(self.rope_dtype)
        rope, rope_descale = fp8_quantize(k_pe, self.rope, self.fp8)
        return q, torch.cat((descale, rope_descale), dim=-1), rope

    def _dequantized(self, q: Tensor, descale: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        c_kv = fp8_dequantize(q, descale[..., : self.groups], self.group, self.compute)
        if self.rope_dtype != self.fp8:
            return c_kv, rope.to(self.compute)
        return c_kv, fp8_dequantize(rope, descale[..., self.groups :], self.rope, self.compute)


class BlockScaledStore(ScaledStore):
    """A scale for every 128 values of a latent, all of a token in one run of bytes: an array ``[B, T, bytes]``.

    With a rank of 512 and 64 rope values in bf16 a token is 656 bytes: 512 e4m3 values, four float32 scales, the rotary
    key. FlashMLA's sparse kernels read the same bytes.
    """

    def __init__(self, batch: int, tokens: int, rank: int, rope: int, *, device: torch.device, **kinds: Any) -> None:
        super().__init__(block_scaled_layout(rank, rope, kinds["fp8"], kinds["rope_dtype"]), rank, rope, **kinds)
        self.bytes = torch.zeros(batch, tokens, self.layout.bytes_per_token, dtype=torch.uint8, device=device)

    def arrays(self) -> dict[str, Tensor]:
        return {"bytes": self.bytes}

    def write(self, slots: Tensor, c_kv: Tensor, k_pe: Tensor) -> None:
        scale_at, rope_at = self._starts()
        parts = [_as_bytes(part) for part in self._quantized(c_kv, k_pe)]
        ends = (scale_at, rope_at, self.layout.bytes_per_token)
        padded, at = [], 0
        for part, end in zip(parts, ends, strict=True):
            padded.append(torch.nn.functional.pad(part, (0, end - at - part.shape[-1])))
            at = end
        self.bytes.index_copy_(1, slots, torch.cat(padded, dim=-1))

    def read(self) -> tuple[Tensor, Tensor]:
        return self._dequantized(*self.parts())

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the bytes: FP8 latents ``[B, T, R]``, float32 scales ``[B, T, G]``, rotary keys ``[B, T, P]``."""
        scale_at, rope_at = self._starts()
        rope_size = self.rope_dtype.itemsize
        # Cut after the dtype is changed: of a whole array Inductor takes a view, a part of one it would copy first.
        scales, ropes = self.bytes.view(torch.float32), self.bytes.view(self.rope_dtype)
        return (
            self.bytes.view(self.fp8)[..., : self.rank],
            scales[..., scale_at // 4 : (scale_at + self.layout.scale_bytes) // 4],
            ropes[..., rope_at // rope_size : (rope_at + self.layout.rope_bytes) // rope_size],
        )

    def _starts(self) -> tuple[int, int]:
        assert self.layout.scale_at is not None and self.layout.rope_at is not None  # noqa: PT018
        return self.layout.scale_at, self.layout.rope_at


def _as_bytes(x: Tensor) -> Tensor:
    """``[…, N]`` as bytes ``[…, N * itemsize]``, in the order of memory of every device there is.

    In compiled code by shifting: Inductor may give a tensor of width 1 strides with which it cannot be viewed as bytes
    (torch 2.11), and this is fused with what computes x.
    """
    size = x.dtype.itemsize
    if size == 1 or not torch.compiler.is_compiling():
        return x.contiguous().view(torch.uint8)
    bits = x.view(torch.int16 if size == 2 else torch.int32)
    return torch.stack([(bits >> 8 * i & 255).to(torch.uint8) for i in range(size)], dim=-1).flatten(-2)


class TokenScaledStore(ScaledStore):
    """One scale for a whole latent, and three arrays, each of which a kernel can load in aligned pieces.

    With a rank of 512 and 64 rope values in bf16 a token is 644 bytes. One scale a token is what a kernel needs to
    multiply in FP8 (SnapMLA, arXiv 2602.10718).
    """

    def __init__(self, batch: int, tokens: int, rank: int, rope: int, *, device: torch.device, **kinds: Any) -> None:
        super().__init__(token_scaled_layout(rank, rope, kinds["fp8"], kinds["rope_dtype"]), rank, rope, **kinds)
        # Bytes, because PyTorch has no index_copy_ for FP8.
        self.c_kv = torch.zeros(batch, tokens, rank, dtype=torch.uint8, device=device)
        self.descale = torch.zeros(batch, tokens, self.layout.scale_bytes // 4, dtype=torch.float32, device=device)
        self.k_pe = torch.zeros(batch, tokens, self.layout.rope_bytes, dtype=torch.uint8, device=device)

    def arrays(self) -> dict[str, Tensor]:
        return {"c_kv": self.c_kv, "descale": self.descale, "k_pe": self.k_pe}

    def write(self, slots: Tensor, c_kv: Tensor, k_pe: Tensor) -> None:
        q, descale, rope = self._quantized(c_kv, k_pe)
        self.c_kv.index_copy_(1, slots, q.view(torch.uint8))
        self.descale.index_copy_(1, slots, descale)
        self.k_pe.index_copy_(1, slots, rope.view(torch.uint8))

    def read(self) -> tuple[Tensor, Tensor]:
        return self._dequantized(*self.parts())

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views: FP8 latents ``[B, T, R]``, float32 scales ``[B, T, 1 or 2]``, rotary keys ``[B, T, P]``."""
        return self.c_kv.view(self.fp8), self.descale, self.k_pe.view(self.rope_dtype)


def _scale_bytes(groups: int, fp8: torch.dtype, rope_dtype: torch.dtype) -> int:
    return 4 * (groups + (rope_dtype == fp8))


def _scaled_name(scales: str, fp8: torch.dtype, rope_dtype: torch.dtype) -> str:
    short = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
    rope = short.get(rope_dtype, str(rope_dtype).removeprefix("torch."))
    return f"{short[fp8]} with a scale {scales}, rope {rope}"


def block_scaled_layout(rank: int, rope: int, fp8: torch.dtype, rope_dtype: torch.dtype) -> KVLayout:
    """Bytes of a token with a scale for every 128 values of its latent."""
    name = _scaled_name(f"a {SCALE_GROUP}", fp8, rope_dtype)
    scales = _scale_bytes(scale_groups(rank), fp8, rope_dtype)
    return KVLayout.in_one_run(name, rank, rope * rope_dtype.itemsize, scales)


def token_scaled_layout(rank: int, rope: int, fp8: torch.dtype, rope_dtype: torch.dtype) -> KVLayout:
    """Bytes of a token with one scale for its latent."""
    name = _scaled_name("a token", fp8, rope_dtype)
    return KVLayout(name, rank, rope * rope_dtype.itemsize, _scale_bytes(1, fp8, rope_dtype))
