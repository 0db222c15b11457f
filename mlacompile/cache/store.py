"""Memory for the latents and rotary keys of one layer: allocated once, written in place, at addresses that never move.

    write(slots, c_kv, k_pe)     c_kv [B, S, R], k_pe [B, S, P] → the rows ``slots`` of every sequence
    read() → c_kv, k_pe          [B, T, R], [B, T, P], in the dtype that the model computes in

A store says nothing about which rows are in use: that is for whoever holds its length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mlacompile.geometry import KVLayout


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
