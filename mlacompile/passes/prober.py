"""Evaluate a cone on chosen tokens and weights, in float64: what ``probe.py`` asks its questions with."""

from __future__ import annotations

import torch
from torch.fx import Node

from mlacompile.passes.cone import Cone, WalkError
from mlacompile.passes.maps import Plain, Probe, UpProjection, WeightView, weight_of
from mlacompile.passes.replay import evaluate


class Prober:
    """Evaluates one cone on chosen tokens and weights."""

    def __init__(self, cone: Cone, k: Node, v: Node) -> None:
        self.cone, self.k, self.v = cone, k, v
        self.widths = [latent.width for latent in cone.latents]
        self.weight_shapes = [cone.feed_shape(n, 1, 1) for n in cone.weights]
        self.offsets = [1]
        for shape in self.weight_shapes:
            self.offsets.append(self.offsets[-1] + _numel(shape))

    def __call__(self, latents: list[torch.Tensor], weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as ``[batch, H, tokens, rows]`` for latents ``[batch, tokens, width]`` and weights."""
        batch, tokens = latents[0].shape[:2]
        try:
            env = evaluate(self.cone, self.cone.feeds(latents, weights), batch, tokens)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise WalkError(f"the way from the latent to K or V could not be evaluated on its own: {error}") from error
        return env[self.k], env[self.v]

    def ones(self) -> list[torch.Tensor]:
        return [torch.ones(s, dtype=torch.float64) for s in self.weight_shapes]

    def ids(self) -> list[torch.Tensor]:
        return [
            torch.arange(o, o + _numel(s), dtype=torch.float64).reshape(s)
            for o, s in zip(self.offsets, self.weight_shapes, strict=False)
        ]

    def random(self, seed: int = 0x31A) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        # Uniform numbers: weights of large models have many, and normal ones take three times as long.
        return [torch.rand(s, dtype=torch.float64, generator=generator).sub_(0.5) for s in self.weight_shapes]

    def units(self, latent: int, weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[H, width, rows]`` for each unit vector of a latent, less what they are for zero."""
        width = self.widths[latent]
        feeds = [torch.zeros(1, width + 1, w, dtype=torch.float64) for w in self.widths]
        feeds[latent][0, :width] = torch.eye(width, dtype=torch.float64)
        k, v = self(feeds, weights)
        return tuple(x[0, :, :width] - x[0, :, width:] for x in (k, v))  # type: ignore[return-value]


class Maps:
    """The maps of a probe at given weights: what a rewrite uses, as tensors."""

    def __init__(self, prober: Prober, found: Probe, weights: list[torch.Tensor]) -> None:
        self.w_uk = self._map(prober, found.w_uk, found.c_kv, found.k_rows, weights)
        self.w_uv = self._map(prober, found.w_uv, found.c_kv, found.v_rows, weights)
        self.w_pe = None if found.k_pe is None else self._map(prober, found.w_pe, found.k_pe, found.pe_rows, weights)
        self.v_bias: torch.Tensor | None = None
        if isinstance(found.v_bias, WeightView):
            self.v_bias = weight_of(found.v_bias, weights)[..., 0]
        elif found.v_bias is not None:
            _, v = prober([torch.zeros(1, 1, w, dtype=torch.float64) for w in prober.widths], weights)
            self.v_bias = v[0, :, 0, found.v_rows[0] : sum(found.v_rows)]

    @staticmethod
    def _map(
        prober: Prober, found: UpProjection, latent: int, rows: tuple[int, int], weights: list[torch.Tensor]
    ) -> torch.Tensor:
        """``[H or 1, rows, width]``."""
        if isinstance(found, Plain):
            return found.scale * torch.eye(rows[1], dtype=torch.float64)[None]
        if isinstance(found, WeightView):
            return weight_of(found, weights)
        maps = prober.units(latent, weights)[0 if found.of == "k" else 1]
        maps = maps[:, :, rows[0] : sum(rows)].transpose(1, 2)
        return maps[:1] if found.shared else maps


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
