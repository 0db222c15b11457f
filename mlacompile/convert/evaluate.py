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


@torch.inference_mode()
def measure(predict: Predict, windows: Tensor, *, original: Predict | None = None, batch: int = 1) -> Score:
    """Mean float32 loss of ``predict`` on ``windows [W, T]``, labels within a window; divergence from ``original``."""
    loss, divergence, tokens = 0.0, 0.0, 0
    for ids in windows.split(batch):
        logits = predict(ids)[:, :-1].float()
        loss += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="sum").item()
        tokens += ids[:, 1:].numel()
        if original is not None:
            true = original(ids)[:, :-1].float().log_softmax(-1)
            divergence += F.kl_div(logits.log_softmax(-1), true, log_target=True, reduction="sum").item()
    return Score(loss / tokens, tokens, None if original is None else divergence / tokens)
