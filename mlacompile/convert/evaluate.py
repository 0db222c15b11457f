"""What a conversion cost: perplexity and divergence on evenly spread windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mlacompile.errors import UnsupportedInputError

#: token ids ``[B, T]`` to logits ``[B, T, vocabulary]``
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """Averages over predicted tokens. ``divergence``: KL(original ‖ converted) in nats, if there was an original."""

    loss: float
    tokens: int
    divergence: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def spread_windows(ids: Tensor, *, length: int = 1024, count: int = 12) -> Tensor:
    """``[count, length]``: of the whole windows of ``ids [N]``, ``count`` spread evenly, first and last included.

    Raises UnsupportedInputError if the text has fewer whole windows than that.
    """
    whole = ids.numel() // length
    if whole < count:
        raise UnsupportedInputError(
            f"got a text of {ids.numel()} tokens, which is {whole} windows of {length}; expected at least {count}: "
            "give a longer text, or ask for fewer or shorter windows"
        )
    chosen = torch.linspace(0, whole - 1, count).long()
    return ids[: whole * length].view(whole, length)[chosen]


class Tally:
    """Adds up losses, window by window."""

    def __init__(self) -> None:
        self._loss, self._divergence, self._tokens, self._compared = 0.0, 0.0, 0, False

    @torch.inference_mode()
    def add(self, logits: Tensor, ids: Tensor, *, original: Tensor | None = None) -> None:
        """Logits ``[T, vocabulary]`` for ids ``[T]``, whose labels are within the window; float32."""
        logits, labels = logits[:-1].float(), ids[1:].to(logits.device)
        self._loss += F.cross_entropy(logits, labels, reduction="sum").item()
        self._tokens += labels.numel()
        if original is not None:
            self._compared = True
            true = original[:-1].float().log_softmax(-1)
            self._divergence += F.kl_div(logits.log_softmax(-1), true, log_target=True, reduction="sum").item()

    def score(self) -> Score:
        divergence = self._divergence / self._tokens if self._compared else None
        return Score(self._loss / self._tokens, self._tokens, divergence)


@torch.inference_mode()
def measure(predict: Predict, windows: Tensor, *, original: Predict | None = None, batch: int = 1) -> Score:
    """Mean float32 loss of ``predict`` on ``windows [W, T]``, labels within a window; divergence from ``original``."""
    tally = Tally()
    for ids in windows.split(batch):
        true = None if original is None else original(ids)
        for row, (logits, tokens) in enumerate(zip(predict(ids), ids)):
            tally.add(logits, tokens, original=None if true is None else true[row])
    return tally.score()
