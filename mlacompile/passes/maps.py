"""What a probe finds K and V to be: maps from a latent, each a view of one weight, none at all, or computed.

A rotary key reaches K with no weight at all; the latent reaches K and V through one element of one weight each, or with
no weight either where a graph is absorbed already. What is linear but neither (two weights in a row, a factor for each
row) is computed from the weights when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from mlacompile.passes.views import View


@dataclass(frozen=True)
class WeightView:
    """``scale`` times a view of the ``leaf``-th weight of a cone."""

    leaf: int
    view: View
    scale: float


@dataclass(frozen=True)
class Plain:
    """``scale`` times the latent itself: what is queried with, or comes out, is absorbed already."""

    scale: float


@dataclass(frozen=True)
class Computed:
    """A map that is linear but no view of one weight: what K ("k") or V ("v") is for unit latents.

    heads: one map for all heads (of the first head), or one a head.
    """

    of: str
    shared: bool = False


UpProjection: TypeAlias = WeightView | Plain | Computed


@dataclass(frozen=True)
class Probe:
    """What K and V are: indices into the cone's latents, row ranges, and how rows come from latents.

    c_kv: which latent holds the compressed keys and values. k_pe: which one the rotary key, or None.
    k_rows, pe_rows, v_rows: (start, length) of the rows of K that come from the latent, from the rotary key, and of V.
    w_uk ``[H, N, R]``, w_uv ``[H, V, R]``. v_bias ``[H, V]``: a bias on V, or None. k_bias: whether K has one (it
    shifts all scores of a query alike, and cancels in a softmax that has no sink). w_pe: how the rotary key gets into
    its rows, the same for every head.
    """

    c_kv: int
    k_pe: int | None
    k_rows: tuple[int, int]
    pe_rows: tuple[int, int]
    v_rows: tuple[int, int]
    w_uk: UpProjection
    w_uv: UpProjection
    v_bias: WeightView | Computed | None
    w_pe: Plain | Computed
    k_bias: bool
    parts: tuple[tuple[int, ...], ...] = ()  # latents of the cone that count as one here; empty: each is one

    @property
    def absorbed_already(self) -> bool:
        """Whether the graph attends to the latent itself."""
        return isinstance(self.w_uk, Plain)

    @property
    def computed(self) -> bool:
        """Whether anything has to be computed from weights in every call."""
        return any(isinstance(w, Computed) for w in (self.w_uk, self.w_uv, self.v_bias, self.w_pe))


def weight_of(found: WeightView, weights: list[torch.Tensor]) -> torch.Tensor:
    """The view of the weight, with its factor."""
    return found.scale * found.view.apply(weights[found.leaf])
