"""Random grouped-query layers and inputs for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.convert.form import GQALayer


def random_layer(
    *, heads: int = 4, groups: int = 2, width: int = 8, hidden: int = 24, seed: int = 0, base: float = 100.0
) -> GQALayer:
    """Weights that make attention peaked enough for scores to matter."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int, gain: float = 1.0) -> Tensor:
        return gain * torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    return GQALayer(
        w_q=weight(heads, width, hidden, gain=2.0),
        w_k=weight(groups, width, hidden, gain=2.0),
        w_v=weight(groups, width, hidden),
        w_o=torch.randn(hidden, heads, width, generator=generator) / (heads * width) ** 0.5,
        b_q=None,
        b_k=None,
        b_v=None,
        b_o=None,
        inv_freq=base ** -(torch.arange(width // 2) * 2 / width),
        scale=width**-0.5,
    )


def random_input(windows: int = 8, length: int = 48, hidden: int = 24, seed: int = 1) -> Tensor:
    """Inputs whose directions differ in size, as those of real models do: something to compress."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0.5, -1, hidden)
    turn = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    return (torch.randn(windows, length, hidden, generator=generator) * sizes) @ turn
