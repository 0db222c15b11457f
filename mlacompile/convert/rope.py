"""Any rotary frequencies in a configuration that stock classes read: a longrope table, or the default one if it fits.

Stock: ``inv_freq[i] = 1 / (factor[i] · base^(2i/P))`` in float32. Positions multiply the rounding of a frequency, so
the factor is searched whose float32 result is nearest to the frequency that is wanted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: With this ``factor``, stock classes compute ``mscale = 1 + mscale_all_dim``.
_UNIT_FACTOR = math.exp(10.0)
_ULPS = 8


def longrope(inv_freq: Tensor, *, theta: float, positions: int, score_factor: float = 1.0) -> dict[str, Any]:
    """``rope_parameters`` for exactly these frequencies [P/2], whose zeros are lanes that never turn.

    ``score_factor`` multiplies the scores on top of ``(N + P)**-0.5``: stock classes square YaRN's ``mscale`` for it.
    The weights need not be scaled then, and keep their bits.
    """
    factors = _factors(inv_freq, theta)
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "factor": _UNIT_FACTOR,
        "original_max_position_embeddings": positions,
    }
    if score_factor != 1.0:
        parameters["mscale_all_dim"] = (math.sqrt(score_factor) - 1.0) / (0.1 * math.log(_UNIT_FACTOR))
    return parameters


def default_theta(inv_freq: Tensor) -> float | None:
    """The base whose default table these frequencies [P/2] are, or None: ``inv_freq[i] = base^(-2i/P)``."""
    pairs = len(inv_freq)
    wanted = inv_freq.double()
    if pairs < 2 or wanted[0] != 1.0 or wanted.min() <= 0:
        return None
    theta = float(wanted[1] ** -pairs)
    theta = float(round(theta)) if abs(theta - round(theta)) < 1e-3 * theta else theta
    table = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return theta if torch.allclose(table, wanted, rtol=1e-5, atol=0) else None


def _factors(inv_freq: Tensor, theta: float) -> list[float]:
    pairs = len(inv_freq)
    powers = theta ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / (2 * pairs))
    wanted = inv_freq.float()
    best = 1.0 / (wanted.double() * powers.double())
    candidates = [best.float()]
    for direction in (0.0, math.inf):
        step = best.float()
        for _ in range(_ULPS):
            step = torch.nextafter(step, torch.tensor(direction))
            candidates.append(step)
    table = torch.stack(candidates)
    errors = (1.0 / (table * powers) - wanted).abs()
    chosen = table.gather(0, errors.argmin(0, keepdim=True))[0]
    # An infinite factor has no place in JSON; a lane that never turns gets the largest finite one.
    return chosen.clamp(max=torch.finfo(torch.float32).max / powers.max()).tolist()
