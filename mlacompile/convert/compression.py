"""From a budget and a text to compressed layers: what is asked for is checked, the text is cut, the method is run.

The last part of the text is for validation: nothing is fitted to it, and what has to be chosen is chosen by it. Texts
to report on are others, and nothing is fitted to or chosen by them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.convert.distill import Progress
from mlacompile.convert.effort import DEFAULT, EFFORTS, Effort
from mlacompile.convert.evaluate import Score, Tally, spread_windows
from mlacompile.convert.families import GQAModel
from mlacompile.convert.form import GQALayer, MLALayer, OneByOne
from mlacompile.convert.heal import heal_model
from mlacompile.convert.latent import (
    LayerReport,
    Recipe,
    advance_stream,
    compress_model,
    our_method,
    shared_frequencies,
)
from mlacompile.convert.plan import meta_layer
from mlacompile.convert.shelf import Shelf
from mlacompile.convert.source import Source
from mlacompile.convert.stream import Blocks, Layers
from mlacompile.convert.texts import tokenize
from mlacompile.errors import UnsupportedInputError

#: Length of a window. Scores are fitted at the distances that occur, so windows are as long as texts usually are.
WINDOW = 1024
_SHORTEST_WINDOW = 256
_EVALUATION_WINDOWS = 12
_FEWEST_TOKENS = 4096
_VALIDATION_SHARE = 0.1
#: Healing goes through the text again and again; with less than this the original writes more, where that is quick.
_ENOUGH_TOKENS = 3 << 19
#: Windows of a step of healing, and their length: some seconds of work on a CPU, some tenths of one on a GPU.
_HEALED = {"cuda": (16, 1024), "cpu": (2, 512)}
#: Keys are put up to this many windows away, so that scores stay bounded in longer texts.
_REACH = 4
#: Queries of each window that are enough to choose frequencies by, which many layers vote on.
_SCOUTED_QUERIES = 128
#: Cache widths that vLLM has kernels for, and the only ones it is worth compressing to for it.
_ENGINE = {"kv_lora_rank": 512, "rope_dim": 64}


@dataclass(frozen=True)
class Budget:
    """What a token may take in the cache of a layer: ``rank`` values of latent and ``rope_dim`` rotary ones."""

    rank: int
    rope_dim: int

    @classmethod
    def parse(
        cls,
        model: GQAModel,
        *,
        kv_budget: float | None = None,
        kv_lora_rank: int | None = None,
        rope_dim: int | None = None,
        target: str = "transformers",
    ) -> Budget | None:
        """What a user asked for; None if nothing was, and the conversion is to lose nothing.

        Args:
            model: the source.
            kv_budget: share of its cache to keep.
            kv_lora_rank: width of the latent, instead of a share.
            rope_dim: rotary lanes; by default half as wide as a head, but at most a third of what is kept.
            target: vLLM takes 512 + 64 alone.

        Raises:
            UnsupportedInputError: a share outside (0, 1], or more than there is.
        """
        if kv_budget is None and kv_lora_rank is None and rope_dim is None:
            return None
        if kv_budget is not None and not 0 < kv_budget <= 1:
            raise UnsupportedInputError(f"--kv-budget {kv_budget}: expected a share of the cache, over 0, at most 1")
        if kv_budget is not None and kv_lora_rank is not None:
            raise UnsupportedInputError("--kv-budget and --kv-lora-rank both say how much to keep; give one of them")
        if kv_budget is None and kv_lora_rank is None:
            raise UnsupportedInputError("--rope-dim needs --kv-lora-rank or --kv-budget beside it")
        total = model.cache_values
        if target == "vllm" and kv_lora_rank is None and rope_dim is None:
            kv_lora_rank, rope_dim = _ENGINE["kv_lora_rank"], _ENGINE["rope_dim"]
        values = None if kv_budget is None else math.floor(kv_budget * total)
        if rope_dim is None:
            third = values // 3 if values is not None else (kv_lora_rank or 0) // 2
            rope_dim = max(2, min(model.head_dim // 2, third) // 2 * 2)
        rank = kv_lora_rank if kv_lora_rank is not None else (values or 0) - rope_dim
        if rope_dim < 2 or rope_dim % 2 or rope_dim > total // 2:
            raise UnsupportedInputError(f"--rope-dim {rope_dim}: expected an even number from 2 to {total // 2}")
        if not 1 <= rank <= total:
            what = f"--kv-lora-rank {rank}" if kv_lora_rank is not None else f"--kv-budget {kv_budget}"
            raise UnsupportedInputError(
                f"{what}: {rank} values of latent beside {rope_dim} rotary lanes; expected 1 to {total}, which is what "
                f"the source caches. {'Give a larger share, or a smaller --rope-dim' if rank < 1 else 'Give less'}"
            )
        return cls(rank, rope_dim)

    def shape(self, model: GQAModel, dtype: torch.dtype, *, bias: bool) -> MLALayer:
        """A layer of the result without values, to decide by before any work; its frequencies are a stand-in."""
        source = meta_layer(model, dtype)
        heads, width, hidden = source.w_q.shape

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        return MLALayer(
            w_q=empty(heads, width + self.rope_dim, hidden),
            w_dkv=empty(self.rank, hidden),
            w_kr=empty(self.rope_dim, hidden),
            w_uk=empty(heads, width, self.rank),
            w_uv=empty(heads, width, self.rank),
            w_o=empty(hidden, heads, width),
            b_q=None if source.b_q is None else empty(heads, width + self.rope_dim),
            b_dkv=None if source.b_k is None and source.b_v is None else empty(self.rank),
            b_kr=None if source.b_k is None else empty(self.rope_dim),
            b_o=empty(hidden) if bias or source.b_o is not None else None,
            inv_freq=model.inv_freq[engine_frequencies(model, self.rope_dim)],
            scale=source.scale,
        )


def engine_frequencies(model: GQAModel, rope_dim: int) -> list[int]:
    """Evenly spaced ones: of a default table they make a default table, the only kind vLLM takes."""
    pairs, lanes = model.head_dim // 2, rope_dim // 2
    return [i * pairs // lanes for i in range(lanes)]


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens: ``[W, T]`` to fit to, ``[V, T]`` to choose by; ``digest`` of the text they are from."""

    windows: Tensor
    validation: Tensor
    digest: str = ""
    text: Tensor | None = None  #: all that may be fitted to, ``[N]``, for what needs more than the windows

    @classmethod
    def read(cls, source: Source, file: str | Path, effort: Effort = EFFORTS[DEFAULT]) -> Calibration:
        """Cut a text into as many windows as ``effort`` says.

        Raises ``UnsupportedInputError``: no text, too short, or no tokenizer beside the weights.
        """
        ids = read_ids(source, file, option="--calibrate", at_least=_FEWEST_TOKENS)
        # A short text is cut into shorter windows, so that several remain to choose by.
        limit = min(WINDOW, source.model.config.max_position_embeddings)
        length = max(min(_SHORTEST_WINDOW, limit), min(limit, 2 ** int(math.log2(len(ids) / 32))))
        held = max(length, math.floor(len(ids) * _VALIDATION_SHARE))
        fitted, chosen_by = ids[: len(ids) - held], ids[len(ids) - held :]
        tokens = effort.windows * WINDOW
        return cls(
            spread_windows(fitted, length=length, count=min(tokens // length, len(fitted) // length)),
            spread_windows(chosen_by, length=length, count=min(effort.validation, len(chosen_by) // length)),
            hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
            fitted,
        )


@dataclass(frozen=True)
class Evaluation:
    """A text to report on: 12 windows ``[12, 1024]`` spread evenly, fewer and shorter ones if it is short."""

    name: str
    windows: Tensor

    @classmethod
    def read(cls, source: Source, file: str | Path) -> Evaluation:
        """Cut a text. Raises ``UnsupportedInputError`` as calibration does."""
        ids = read_ids(source, file, option="--evaluate", at_least=_SHORTEST_WINDOW)
        limit = min(WINDOW, source.model.config.max_position_embeddings)
        length = max(min(_SHORTEST_WINDOW, limit), min(limit, 2 ** int(math.log2(len(ids)))))
        count = min(_EVALUATION_WINDOWS, len(ids) // length)
        return cls(Path(file).name, spread_windows(ids, length=length, count=count))


def read_ids(source: Source, file: str | Path, *, option: str, at_least: int) -> Tensor:
    """Token ids of a text, by the source's tokenizer. Raises ``UnsupportedInputError``: there is none, or no text."""
    tokenizer = load_tokenizer(source.weights.folder)
    if tokenizer is None:
        raise UnsupportedInputError(f"{source.weights.folder}: no tokenizer there, and {option} needs it")
    ids = tokenize(tokenizer, file, at_least=at_least)
    if int(ids.max()) >= source.model.vocab:
        raise UnsupportedInputError(
            f"{source.weights.folder}: its tokenizer makes token {int(ids.max())}, the model has "
            f"{source.model.vocab} tokens"
        )
    return ids


def refuse(model: GQAModel, what: str = "compress") -> None:
    """Models whose attention ``attend`` does not describe. Raises ``UnsupportedInputError``."""
    reason = None
    if model.qk_norm:
        reason = "queries and keys are normalized head by head, which no linear map of keys goes through"
    elif getattr(model.config, "attn_logit_softcapping", None):
        reason = "its scores have a soft cap"
    elif (getattr(model.config, "sliding_window", None) or WINDOW) < WINDOW:
        reason = f"its sliding window is shorter than the {WINDOW} tokens it would be calibrated on"
    if reason:
        raise UnsupportedInputError(
            f"{model.family} does not {what}: {reason}. Without a budget or a text it converts losslessly"
        )


@dataclass(frozen=True)
class Fitted:
    """Compressed layers, what each of them misses, and the losses of source and result on the validation windows."""

    layers: Sequence[MLALayer]
    reports: list[LayerReport]
    before: Score
    after: Score


def compress(
    source: Source,
    budget: Budget,
    calibration: Calibration,
    shelf: Shelf,
    *,
    target: str = "transformers",
    seed: int = 0,
    device: str | torch.device = "cpu",
    frequencies: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    effort: Effort = EFFORTS[DEFAULT],
    advance: Callable[[int, int], None] = lambda done, total: None,
    **recipe: Any,
) -> Fitted:
    """Every layer in latent form, within ``budget``, rounded to ``dtype``. One layer is in memory at a time.

    Layers are put on ``shelf``, and taken from it if an earlier run has put them there. ``frequencies`` of the rotary
    lanes, by number, are chosen if they are not given. Fields of ``Recipe`` are overridden by ``effort``, and those by
    ``recipe``.
    """
    blocks, layers = Blocks(source, device), Layers(source, device)
    embedded = blocks.embed(torch.cat((calibration.windows, calibration.validation)))
    asked: dict[str, Any] = {
        "rope_dim": budget.rope_dim,
        "rank": budget.rank,
        "reach": min(_REACH * embedded.shape[1], source.model.config.max_position_embeddings),
        "bias": target != "vllm",
        "seed": seed,
    }
    how = Recipe(**asked | dict(effort.recipe) | recipe)
    how = replace(how, scouts=min(how.scouts, len(layers)))
    reports: list[LayerReport] = []

    def done(i: int, layer: MLALayer, report: LayerReport) -> None:
        reports.append(report)
        advance(i + 1, len(layers))

    if target == "vllm":
        frequencies = engine_frequencies(source.model, budget.rope_dim)
    elif frequencies is None:
        few = max(1, effort.scouted * WINDOW // embedded.shape[1])
        scouting = replace(how, queries=_SCOUTED_QUERIES)
        frequencies = shelf.remember(
            "frequencies", lambda: shared_frequencies(blocks, layers, embedded[:few], scouting)
        )
    method = our_method(frequencies)
    held = len(calibration.validation)
    walk = compress_model(
        blocks,
        layers,
        embedded,
        how,
        method=method,
        held=held,
        shelf=shelf,
        stored=lambda layer: rounded(layer, dtype, device),
        progress=done,
    )
    before, after = _scores(blocks, calibration.validation, [walk.original, walk.compressed])
    return Fitted(OneByOne(len(layers), shelf.get), reports, before, after)


def heal(
    source: Source,
    layers: Sequence[MLALayer],
    calibration: Calibration,
    folder: Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Sequence[MLALayer], Progress]:
    """``layers`` after ``minutes`` or ``steps`` of distillation on the calibration text without its validation part.

    On a GPU a text of less than ``_ENOUGH_TOKENS`` is made up to that by the original itself. Checkpoints, and the
    result, are in ``folder``.
    """
    shelf = Shelf(folder / "healed")
    if len(layers) - 1 in shelf:  # put there last
        return OneByOne(len(layers), shelf.get), Progress(**shelf.note(len(layers) - 1))
    assert calibration.text is not None
    kind = torch.device(device).type
    batch, length = _HEALED.get(kind, _HEALED["cpu"])
    length = min(length, calibration.windows.shape[1])

    def report(state: Progress) -> None:
        done, total = (state.step, steps) if steps is not None else (round(state.seconds), round(state.limit))
        advance(done, total)

    healed, progress = heal_model(
        source,
        layers,
        calibration.text,
        calibration.validation,
        length=length,
        folder=folder,
        device=device,
        seed=seed,
        written=max(0, _ENOUGH_TOKENS - len(calibration.text)) if kind == "cuda" else 0,
        minutes=minutes,
        steps=steps,
        batch=batch,
        report=report,
    )
    for i, layer in enumerate(healed):
        shelf.put(i, layer, vars(progress))
    return OneByOne(len(layers), shelf.get), progress


def evaluate(
    source: Source,
    forms: Sequence[Sequence[MLALayer]],
    windows: Tensor,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """What the original, and with it each of ``forms``, predicts of ``windows [W, T]``; computed in float32.

    ``forms`` are all layers of the model in latent form, rounded to ``dtype``. The divergence is from the original.
    """
    blocks, attention = Blocks(source, device), Layers(source, device)
    streams = [blocks.embed(windows)] * (1 + len(forms))
    for i in range(len(attention)):
        block = blocks[i]
        layers: list[GQALayer | MLALayer] = [attention[i], *(rounded(form[i], dtype, device) for form in forms)]
        streams = [advance_stream(block, stream, layer) for stream, layer in zip(streams, layers)]
        advance(i + 1, len(attention))
    return _scores(blocks, windows, streams)


def _scores(blocks: Blocks, windows: Tensor, streams: list[Tensor]) -> list[Score]:
    """Of what leaves the last layer for ``windows [W, T]``, the original's first and then others, ``[W, T, M]``."""
    tallies = [Tally() for _ in streams]
    for ids, *logits in zip(windows, *(blocks.logits(stream) for stream in streams)):
        for n, (tally, got) in enumerate(zip(tallies, logits)):
            tally.add(got[0], ids, original=logits[0][0] if n else None)
    return [tally.score() for tally in tallies]


def rounded(layer: MLALayer, dtype: torch.dtype, device: str | torch.device = "cpu") -> MLALayer:
    """The layer as it is after being stored in ``dtype``, in float32."""

    stored = layer.map(lambda value: value.to(dtype).float().to(device))
    return replace(stored, inv_freq=layer.inv_freq.to(device))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights, or None."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
