"""From a budget and a text to compressed layers: what is asked for is checked, the text is cut, the method is run.

The last part of the text is for validation: nothing is fitted to it, and what has to be chosen is chosen by it. Texts
to report on are others, and are never seen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.convert.evaluate import spread_windows
from mlacompile.convert.families import GQAModel
from mlacompile.convert.form import MLALayer
from mlacompile.convert.latent import LayerReport, Recipe, compress_model, our_method, shared_frequencies
from mlacompile.convert.source import Source
from mlacompile.convert.stream import Blocks, Layers
from mlacompile.convert.texts import tokenize
from mlacompile.errors import UnsupportedInputError

WINDOW = 256
_CALIBRATION_WINDOWS = 128
_FEWEST_WINDOWS = 16
_VALIDATION_SHARE = 0.1
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
            rope_dim: rotary lanes; by default as wide as a head from two fifths of the cache on, else half of that.
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
            kept = values if values is not None else (kv_lora_rank or 0) + model.head_dim
            rope_dim = max(2, (model.head_dim if kept >= 0.4 * total else model.head_dim // 2) // 2 * 2)
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


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens: ``[W, 256]`` to fit to, ``[V, T]`` to choose by."""

    windows: Tensor
    validation: Tensor

    @classmethod
    def read(cls, source: Source, file: str | Path) -> Calibration:
        """Cut a text. Raises ``UnsupportedInputError``: no text, too short, or no tokenizer beside the weights."""
        tokenizer = load_tokenizer(source.weights.folder)
        if tokenizer is None:
            raise UnsupportedInputError(f"{source.weights.folder}: no tokenizer there, and --calibrate needs it")
        fewest = math.ceil(_FEWEST_WINDOWS * WINDOW / (1 - _VALIDATION_SHARE)) + WINDOW
        ids = tokenize(tokenizer, file, at_least=fewest)
        if int(ids.max()) >= source.model.vocab:
            raise UnsupportedInputError(
                f"{source.weights.folder}: its tokenizer makes token {int(ids.max())}, the model has "
                f"{source.model.vocab} tokens"
            )
        cut = math.floor(len(ids) * (1 - _VALIDATION_SHARE)) // WINDOW * WINDOW
        fitted, chosen_by = ids[:cut], ids[cut:]
        length = 1024 if len(chosen_by) >= 8 * 1024 else WINDOW
        return cls(
            spread_windows(fitted, length=WINDOW, count=min(_CALIBRATION_WINDOWS, len(fitted) // WINDOW)),
            spread_windows(chosen_by, length=length, count=min(8, len(chosen_by) // length)),
        )


def refuse(model: GQAModel) -> None:
    """Models whose attention the method does not describe. Raises ``UnsupportedInputError``."""
    reason = None
    if model.qk_norm:
        reason = "queries and keys are normalized head by head, which no linear map of keys goes through"
    elif getattr(model.config, "attn_logit_softcapping", None):
        reason = "its scores have a soft cap"
    elif (getattr(model.config, "sliding_window", None) or WINDOW) < WINDOW:
        reason = f"its sliding window is shorter than the {WINDOW} tokens it would be calibrated on"
    if reason:
        raise UnsupportedInputError(
            f"{model.family} does not compress: {reason}. Without a budget it converts losslessly"
        )


def compress(
    source: Source,
    budget: Budget,
    calibration: Calibration,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[MLALayer], list[LayerReport]]:
    """Every layer in latent form, within ``budget``, and what each of them misses. One layer is in memory at a time."""
    blocks, layers = Blocks(source, device), Layers(source, device)
    embedded = blocks.embed(calibration.windows)
    recipe = Recipe(rope_dim=budget.rope_dim, rank=budget.rank, scouts=min(8, len(layers)), seed=seed)
    reports: list[LayerReport] = []

    def done(i: int, layer: MLALayer, report: LayerReport) -> None:
        reports.append(report)
        advance(i + 1, len(layers))

    frequencies = shared_frequencies(blocks, layers, embedded, recipe)
    return compress_model(blocks, layers, embedded, recipe, method=our_method(frequencies), progress=done), reports


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights, or None."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
