"""One attention layer in both forms that conversion knows: grouped queries, as stored, and latent attention (MLA).

Letters: H query heads, G key and value heads, D head width, M hidden size, R latent rank, P rotary width,
N width of the part of a head without rotary embedding, V width of a value head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class GQALayer:
    """Grouped-query attention as it is stored, float32 or the stored dtype.

    Lanes are in rotate_half order, as Llama stores them: the rotary pair of lane ``i`` is lane ``i + D/2``.
    """

    w_q: Tensor  #: [H, D, M]
    w_k: Tensor  #: [G, D, M]
    w_v: Tensor  #: [G, D, M]
    w_o: Tensor  #: [M, H, D]
    b_q: Tensor | None  #: [H, D]
    b_k: Tensor | None  #: [G, D]
    b_v: Tensor | None  #: [G, D]
    b_o: Tensor | None  #: [M]
    inv_freq: Tensor  #: [D/2], rotary frequencies of the pairs (i, i + D/2)
    scale: float  #: factor on the scores


@dataclass(frozen=True)
class MLALayer:
    """Multi-head latent attention: ``c_kv = w_dkv x + b_dkv`` and ``k_pe = rope(w_kr x + b_kr)`` are what is cached."""

    w_q: Tensor  #: [H, N + P, M], nope rows first, then rope rows as interleaved pairs (2i, 2i + 1)
    w_dkv: Tensor  #: [R, M]
    w_kr: Tensor  #: [P, M], interleaved pairs
    w_uk: Tensor  #: [H, N, R]
    w_uv: Tensor  #: [H, V, R]
    w_o: Tensor  #: [M, H, V]
    b_q: Tensor | None  #: [H, N + P]
    b_dkv: Tensor | None  #: [R]
    b_kr: Tensor | None  #: [P]
    b_o: Tensor | None  #: [M]
    inv_freq: Tensor  #: [P/2]
    scale: float  #: factor on the scores

    def map(self, change: Callable[[Tensor], Tensor]) -> MLALayer:
        """The layer with ``change`` made to every weight and bias and to the frequencies."""
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if hasattr(value, "dtype")}
        return replace(self, **changed)


class OneByOne(Sequence[T]):
    """``count`` layers, each made when it is asked for: only those that somebody holds are in memory."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[T]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._make(i)
