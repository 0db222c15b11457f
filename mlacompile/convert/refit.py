"""Healing in closed form: a compressed layer's output projection, by least squares against the original's outputs.

The features are what the compressed heads really deliver on the compressed model's own activations, errors of all
earlier layers included; the target is what attention added to the residual stream in the original model. One linear
system a layer, solved in float64, with a ridge that pulls towards the weights that are there: directions that the text
does not visit stay as they were.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mlacompile.convert.form import MLALayer


class OutputFit:
    """Accumulates one layer's normal equations over windows, then solves for ``w_o``, and ``b_o`` if asked."""

    def __init__(self, layer: MLALayer, *, bias: bool = True) -> None:
        self.layer, self.bias = layer, bias
        size = layer.w_o.shape[1] * layer.w_o.shape[2] + bias
        zeros = layer.w_o.new_zeros
        self.features = zeros(size, size, dtype=torch.float64)
        self.wanted = zeros(layer.w_o.shape[0], size, dtype=torch.float64)

    def add(self, heads: Tensor, target: Tensor) -> None:
        """``heads [T, H V]``: what the compressed model's heads deliver; ``target [T, M]``: what should come out."""
        if not self.bias and self.layer.b_o is not None:
            target = target - self.layer.b_o
        seen = torch.cat((heads, torch.ones_like(heads[:, :1])), dim=1) if self.bias else heads
        self.features += (seen.T @ seen).double()
        self.wanted += (target.T @ seen).double()

    def solve(self, ridge: float = 1e-3) -> MLALayer:
        """The layer with its best ``w_o`` and ``b_o``."""
        size = self.layer.w_o.shape[1] * self.layer.w_o.shape[2]
        damped = self.features.clone()
        damped.diagonal()[:size] += ridge * self.features.diagonal()[:size].mean()  # the bias is free
        present = self.layer.w_o.flatten(1).double()
        if self.bias:
            shift = present.new_zeros(len(present)) if self.layer.b_o is None else self.layer.b_o.double()
            present = torch.cat((present, shift[:, None]), dim=1)
        missing = self.wanted - present @ self.features
        change = torch.linalg.solve(damped, missing.T).T.to(self.layer.w_o.dtype)
        w_o = self.layer.w_o + change[:, :size].view_as(self.layer.w_o)
        b_o = self.layer.b_o
        if self.bias:
            b_o = change[:, size] if b_o is None else b_o + change[:, size]
        return replace(self.layer, w_o=w_o, b_o=b_o)
