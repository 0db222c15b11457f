"""A whole model, layer by layer: both models' residual streams walk side by side, and a layer is in memory at a time.

Layers before the current one are compressed in one stream and original in the other. At each layer the original's input
is sampled, the layer is compressed, then refitted on the compressed stream, and both streams step over it.
The decoder layers are called, not known: each must hold its attention as ``self_attn`` and take hidden states
``[B, T, M]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlacompile.convert.attend import GroupedAttention, LatentAttention
from mlacompile.convert.calibrate import Pairs, sample_pairs
from mlacompile.convert.compress import compress
from mlacompile.convert.form import GQALayer, MLALayer
from mlacompile.convert.refit import OutputFit, widest_values
from mlacompile.convert.rotate import Pursuit, choose_frequencies, lanes_at


@dataclass(frozen=True)
class Recipe:
    """How a layer is compressed. The defaults are first guesses: none has been tuned on validation text yet."""

    rope_dim: int
    rank: int
    balance: float = 1.0  # worth of scores against values
    latent_lanes: float = (
        0.25  # share of the rank that keys are expected to take, in complex lanes, while lanes are chosen
    )
    refit: bool = True
    catch_up: float = 0.0  # share of the residual stream's error that each layer is asked to undo
    ridge: float = 1e-3
    queries: int = 16
    keys: int = 16
    scouts: int = 8  # layers that choose the frequencies for all
    seed: int = 0


@dataclass(frozen=True)
class LayerReport:
    """Shares of attention's output energy that are missed on the compressed stream, before and after refitting."""

    missed: float
    missed_after_refit: float


class _Stop(Exception):
    pass


class _Tap(nn.Module):
    """Keeps what reaches the attention, and goes no further unless there is something to go on with."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.seen = self.added = torch.empty(0)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        self.seen = hidden_states
        if self.inner is None:
            raise _Stop
        self.added = self.inner(hidden_states)[0]
        return self.added, None


def _step(block: nn.Module, stream: Tensor, attention: nn.Module) -> Tensor:
    """``stream [B, T, M]`` through ``block`` with ``attention`` in the place of its own."""
    kept = block.self_attn
    block.self_attn = attention
    try:
        out = block(stream, position_embeddings=None)
    finally:
        block.self_attn = kept
    return out if isinstance(out, Tensor) else out[0]


def _attention_input(block: nn.Module, stream: Tensor) -> Tensor:
    tap = _Tap()
    try:
        _step(block, stream, tap)
    except _Stop:
        return tap.seen
    raise AssertionError("the decoder layer did not call its attention")


@torch.inference_mode()
def shared_frequencies(
    blocks: Sequence[nn.Module], layers: Sequence[GQALayer], embedded: Tensor, recipe: Recipe
) -> list[int]:
    """Frequencies of the rotary lanes, by a few layers of the original on windows ``embedded [W, T, M]``."""
    scouts = {round((i + 0.5) * len(blocks) / recipe.scouts - 0.5) for i in range(recipe.scouts)}
    pursuits, importance = [], []
    stream = embedded
    for index, (block, layer) in enumerate(zip(blocks, layers)):
        if index > max(scouts):
            break
        tap = _Tap(GroupedAttention(layer))
        seen, ahead = [], []
        for window in stream.split(1):
            ahead.append(_step(block, window, tap))
            seen.append(tap.seen)
        stream = torch.cat(ahead)
        if index in scouts:
            pairs = _sample(layer, torch.cat(seen), recipe)
            pursuits.append(Pursuit(pairs, layer.inv_freq))
            importance.append(1 / pairs.output)
    latent = round(recipe.latent_lanes * recipe.rank)
    return choose_frequencies(pursuits, count=recipe.rope_dim // 2, latent=latent, importance=importance)


def _sample(layer: GQALayer, x: Tensor, recipe: Recipe) -> Pairs:
    return sample_pairs(layer, x, queries=recipe.queries, keys=recipe.keys, seed=recipe.seed)


#: (layer, its pairs, recipe) to the layer in latent form
Method = Callable[[GQALayer, Pairs, Recipe], MLALayer]


def our_method(frequencies: list[int]) -> Method:
    def method(layer: GQALayer, pairs: Pairs, recipe: Recipe) -> MLALayer:
        latent = round(recipe.latent_lanes * recipe.rank)
        lanes = lanes_at(Pursuit(pairs, layer.inv_freq), frequencies, latent=latent)
        return compress(layer, pairs, lanes, rank=recipe.rank, balance=recipe.balance)

    return method


@torch.inference_mode()
def compress_model(
    blocks: Sequence[nn.Module],
    layers: Sequence[GQALayer],
    embedded: Tensor,
    recipe: Recipe,
    *,
    method: Method,
    progress: Callable[[int, MLALayer, LayerReport], None] | None = None,
) -> list[MLALayer]:
    """All ``layers`` in latent form, calibrated on ``embedded [W, T, M]``, what enters the first decoder layer.

    ``blocks`` are left as they were. ``progress`` gets every layer as it is done.
    """
    original = compressed = embedded
    done = []
    for index, (block, layer) in enumerate(zip(blocks, layers)):
        tap = _Tap(GroupedAttention(layer))
        ahead, seen, added = [], [], []
        for window in original.split(1):
            ahead.append(_step(block, window, tap))
            seen.append(tap.seen)
            added.append(tap.added)
        latent = method(layer, _sample(layer, torch.cat(seen), recipe), recipe)
        report = LayerReport(float("nan"), float("nan"))
        if recipe.refit:
            fit = OutputFit(widest_values(latent))
            for before, now, target in zip(original.split(1), compressed.split(1), added):
                fit.add(_attention_input(block, now), target + recipe.catch_up * (before - now))
            latent, missed, after = fit.solve(recipe.ridge)
            report = LayerReport(missed, after)
            compressed = torch.cat([_step(block, now, LatentAttention(latent)) for now in compressed.split(1)])
        original = torch.cat(ahead)
        done.append(latent)
        if progress is not None:
            progress(index, latent, report)
    return done
