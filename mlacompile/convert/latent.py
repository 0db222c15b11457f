"""A whole model, layer by layer: both models' residual streams walk side by side, and a layer is in memory at a time.

Layers before the current one are compressed in one stream and original in the other. At each layer the original's input
is sampled, the layer is compressed, then refitted on the compressed stream, and both streams step over it.
The decoder layers are called, not known: each must hold its attention as ``self_attn`` and take hidden states
``[B, T, M]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mlacompile.convert.attend import GroupedAttention, LatentAttention, mla_attention, mla_heads, project_heads
from mlacompile.convert.calibrate import Pairs, sample_pairs
from mlacompile.convert.compress import Compression
from mlacompile.convert.form import GQALayer, MLALayer
from mlacompile.convert.refit import OutputFit
from mlacompile.convert.rotate import Pursuit, choose_frequencies, lanes_at
from mlacompile.convert.shelf import Shelf


@dataclass(frozen=True)
class Recipe:
    """How a layer is compressed. The defaults were chosen on validation text (docs/convert-method.md)."""

    rope_dim: int
    rank: int
    balances: tuple[float, ...] = (16.0, 64.0, 256.0)  # worth of scores against values, one is chosen by layer
    latent_lanes: float = 0.25  # share of the rank that keys are expected to take, as complex lanes, in choosing lanes
    refit: bool = True
    ridges: tuple[float, ...] = (1e-2, 1e-1, 1.0)  # of the refit, one or none is chosen by layer
    queries: int = 64  # of each window
    keys: int = 16  # of each query
    even: float = 0.125  # share of the keys that are drawn evenly
    reach: int = 0  # distance up to which keys are put by hand
    scouts: int = 8  # layers that choose the frequencies for all
    bias: bool = True  # let the output have one, which brings the mean of the values
    seed: int = 0


@dataclass(frozen=True)
class LayerReport:
    """``missed``: shares of the energy of attention's output, on windows that nothing was fitted to."""

    balance: float  #: the one that was chosen
    missed: float  #: the layer alone, on the original's input
    missed_in_place: float  #: on the compressed model's own input, which has the errors of all earlier layers
    missed_after_refit: float  #: the same after the refit
    ridge: float | None = None  #: of the refit; None if it was left out


class _Stop(Exception):
    pass


class Tap(nn.Module):
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


def step(block: nn.Module, stream: Tensor, attention: nn.Module) -> Tensor:
    """``stream [B, T, M]`` through ``block`` with ``attention`` in the place of its own."""
    kept = block.self_attn
    block.self_attn = attention
    try:
        out = block(stream, position_embeddings=None)
    finally:
        block.self_attn = kept
    return out if isinstance(out, Tensor) else out[0]


def advance_stream(block: nn.Module, stream: Tensor, layer: GQALayer | MLALayer) -> Tensor:
    """``stream [W, T, M]`` through ``block`` with the attention of ``layer``, a window at a time."""
    attention = GroupedAttention(layer) if isinstance(layer, GQALayer) else LatentAttention(layer)
    with torch.inference_mode():
        return torch.cat([step(block, window, attention) for window in stream.split(1)])


def _attention_input(block: nn.Module, stream: Tensor) -> Tensor:
    tap = Tap()
    try:
        step(block, stream, tap)
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
        tap = Tap(GroupedAttention(layer))
        seen, ahead = [], []
        for window in stream.split(1):
            ahead.append(step(block, window, tap))
            seen.append(tap.seen)
        stream = torch.cat(ahead)
        if index in scouts:
            pairs = _sample(layer, torch.cat(seen), recipe)
            pursuits.append(Pursuit(pairs, layer.inv_freq))
            importance.append(1 / pairs.output)
    latent = round(recipe.latent_lanes * recipe.rank)
    return choose_frequencies(pursuits, count=recipe.rope_dim // 2, latent=latent, importance=importance)


def _sample(layer: GQALayer, x: Tensor, recipe: Recipe) -> Pairs:
    return sample_pairs(
        layer, x, queries=recipe.queries, keys=recipe.keys, even=recipe.even, reach=recipe.reach, seed=recipe.seed
    )


#: (layer, windows of its input, recipe) to candidates for its latent form, each with the balance it was made with
Method = Callable[[GQALayer, Tensor, Recipe], Iterator[tuple[float, MLALayer]]]


def our_method(frequencies: list[int]) -> Method:
    """The layer with rotary lanes at ``frequencies``, once for every balance of the recipe."""

    def method(layer: GQALayer, x: Tensor, recipe: Recipe) -> Iterator[tuple[float, MLALayer]]:
        latent = round(recipe.latent_lanes * recipe.rank)
        pairs = _sample(layer, x, recipe)
        lanes = lanes_at(Pursuit(pairs, layer.inv_freq, only=frequencies), frequencies, latent=latent)
        compression = Compression(layer, pairs, lanes)
        for balance in recipe.balances:
            yield balance, compression.to_rank(recipe.rank, balance=balance, bias=recipe.bias)

    return method


def missed(got: Tensor, target: Tensor) -> float:
    """Share of the energy of ``target`` that ``got`` misses."""
    return float((got - target).square().sum() / target.square().sum())


class _Known(nn.Module):
    """Attention whose output is known already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return self.output, None


@dataclass(frozen=True)
class Walk:
    """Where a walk over a model ended: its layers, and what leaves the last one for the held windows, ``[V, T, M]``."""

    layers: list[MLALayer]
    original: Tensor
    compressed: Tensor


@torch.inference_mode()
def compress_model(
    blocks: Sequence[nn.Module],
    layers: Sequence[GQALayer],
    embedded: Tensor,
    recipe: Recipe,
    *,
    method: Method,
    held: int,
    shelf: Shelf | None = None,
    stored: Callable[[MLALayer], MLALayer] = lambda layer: layer,
    progress: Callable[[int, MLALayer, LayerReport], None] | None = None,
) -> Walk:
    """All ``layers`` in latent form, calibrated on ``embedded [W, T, M]``, what enters the first decoder layer.

    Nothing is fitted to the last ``held`` windows: what has to be chosen is chosen by them. ``blocks`` are left as
    they were. Layers on ``shelf`` are taken from it, others are put there. ``stored`` rounds a layer as it will be
    kept, so that later layers see that too. ``progress`` gets every layer as it is done.
    """
    original = compressed = embedded
    done = []
    for index, (block, layer) in enumerate(zip(blocks, layers)):
        # What leaves the last layer is of interest for the held windows alone: by them the whole is measured.
        gone = 0 if index + 1 < len(blocks) else len(embedded) - held
        original, x, target = _over_original(block, layer, original, gone)
        if shelf is not None and index in shelf:
            latent = shelf.get(index).map(lambda value: value.to(embedded.device))
            report = LayerReport(**shelf.note(index))
            compressed = advance_stream(block, compressed[gone:], latent)
        else:
            latent, report = _best(method(layer, x[:-held], recipe), x[-held:], target[-held:])
            latent = stored(latent)
            inputs = torch.cat([_attention_input(block, now) for now in compressed.split(1)])
            heads = torch.cat([mla_heads(latent, one) for one in inputs.split(1)])
            if recipe.refit:
                latent, report = _refitted(latent, heads, target, held, recipe, report)
                latent = stored(latent)
            if shelf is not None:
                shelf.put(index, latent, vars(report))
            # A window at a time, as a run that takes the layer from its shelf does: the same sums in the same order.
            outputs = [project_heads(latent, one) for one in heads[gone:].split(1)]
            moved = [step(block, now, _Known(out)) for now, out in zip(compressed[gone:].split(1), outputs)]
            compressed = torch.cat(moved)
        done.append(latent)
        if progress is not None:
            progress(index, latent, report)
    return Walk(done, original, compressed)


def _over_original(block: nn.Module, layer: GQALayer, stream: Tensor, gone: int) -> tuple[Tensor, Tensor, Tensor]:
    """``stream [W, T, M]`` over ``block`` without its first ``gone`` windows; of all, what attention got and added."""
    tap = Tap(GroupedAttention(layer))
    ahead, seen, added = [], [], []
    for number, window in enumerate(stream.split(1)):
        if number < gone:
            tap(_attention_input(block, window))
        else:
            ahead.append(step(block, window, tap))
        seen.append(tap.seen)
        added.append(tap.added)
    return torch.cat(ahead), torch.cat(seen), torch.cat(added)


def _best(candidates: Iterator[tuple[float, MLALayer]], x: Tensor, target: Tensor) -> tuple[MLALayer, LayerReport]:
    """The candidate that misses least on windows ``x [V, T, M]`` of the original's input."""
    least, best = float("inf"), None
    for balance, candidate in candidates:
        error = missed(torch.cat([mla_attention(candidate, one) for one in x.split(1)]), target)
        if best is None or error < least:
            least, best = error, (candidate, LayerReport(balance, error, float("nan"), float("nan")))
    assert best is not None
    return best


def _refitted(
    layer: MLALayer, heads: Tensor, target: Tensor, held: int, recipe: Recipe, report: LayerReport
) -> tuple[MLALayer, LayerReport]:
    """``layer`` with the output projection, of several and of the one it has, that is best on the last windows."""
    fit = OutputFit(layer, bias=recipe.bias)
    for one, wanted in zip(heads[:-held], target[:-held]):
        fit.add(one, wanted)
    before = missed(project_heads(layer, heads[-held:]), target[-held:])
    least, chosen, best = before, None, layer
    for ridge in recipe.ridges:
        candidate = fit.solve(ridge)
        error = missed(project_heads(candidate, heads[-held:]), target[-held:])
        if error < least:
            least, chosen, best = error, ridge, candidate
    return best, replace(report, missed_in_place=before, missed_after_refit=least, ridge=chosen)
