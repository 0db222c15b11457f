"""Healing in closed form: a compressed layer's output projection, by least squares against the original's outputs.

The features are what the compressed heads really deliver on the compressed model's own activations, errors of all
earlier layers included; the target is what attention added to the residual stream in the original model, and a share of
what earlier layers left wrong there. One linear system a layer, solved in float64, with a ridge that pulls towards the
weights that are there: directions that the text does not visit stay as they were.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mlacompile.convert.attend import mla_heads
from mlacompile.convert.form import MLALayer


def widest_values(layer: MLALayer) -> MLALayer:
    """The same function with value heads as wide as the latent, if that is narrower: w_o then may read all of it."""
    heads, width, rank = layer.w_uv.shape
    if rank >= width:
        return layer
    identity = torch.eye(rank, dtype=layer.w_uv.dtype, device=layer.w_uv.device).expand(heads, rank, rank)
    return replace(layer, w_uv=identity.clone(), w_o=torch.einsum("mhd,hdr->mhr", layer.w_o, layer.w_uv))


class OutputFit:
    """Accumulates the normal equations of one layer over windows, then solves them."""

    def __init__(self, layer: MLALayer) -> None:
        self.layer = layer
        size = layer.w_o.shape[1] * layer.w_o.shape[2] + 1
        zeros = layer.w_o.new_zeros
        self.features = zeros(size, size, dtype=torch.float64)
        self.missing = zeros(layer.w_o.shape[0], size, dtype=torch.float64)
        self.error = self.energy = 0.0

    def add(self, x: Tensor, target: Tensor) -> None:
        """``x [B, T, M]``: what the compressed model feeds this layer; ``target [B, T, M]``: what should come out."""
        mixed = mla_heads(self.layer, x).flatten(0, 1)
        missing = target.flatten(0, 1) - F.linear(mixed, self.layer.w_o.flatten(1), self.layer.b_o)
        seen = torch.cat((mixed, torch.ones_like(mixed[:, :1])), dim=1)
        self.features += (seen.T @ seen).double()
        self.missing += (missing.T @ seen).double()
        self.error += missing.square().sum().item()
        self.energy += target.square().sum().item()

    def solve(self, ridge: float = 1e-3) -> tuple[MLALayer, float, float]:
        """The layer with its best w_o and b_o, and the share of the target's energy missed before and after."""
        damping = ridge * self.features.diagonal()[:-1].mean()
        damped = self.features.clone()
        damped.diagonal()[:-1] += damping  # the bias is free
        step = torch.linalg.solve(damped, self.missing.T).T
        gained = 2 * (step * self.missing).sum() - ((step @ self.features) * step).sum()
        w_o = self.layer.w_o + step[:, :-1].view_as(self.layer.w_o).to(self.layer.w_o.dtype)
        bias = step[:, -1].to(self.layer.w_o.dtype)
        refitted = replace(self.layer, w_o=w_o, b_o=bias if self.layer.b_o is None else self.layer.b_o + bias)
        return refitted, self.error / self.energy, (self.error - gained.item()) / self.energy
