"""How much work a fit may be: what is read of a text, how densely it is sampled, what is tried.

On a small model most of the time goes into windows, because both models' layers run over each of them. Fast reads
less than half as many, draws more queries from each, which keeps most of the sample, and leaves out what is seldom
chosen. docs/convert.md has what each costs and loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Effort:
    """Windows are of 1024 tokens; of shorter ones, in a short text, it is as many tokens."""

    windows: int  #: to fit to
    validation: int  #: to choose by
    scouted: int  #: of the windows to fit to: those that the frequencies are chosen by
    recipe: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  #: fields of ``latent.Recipe``


EFFORTS = {
    "fast": Effort(
        windows=6,
        validation=2,
        scouted=2,
        recipe=MappingProxyType({"queries": 128, "balances": (64.0, 256.0), "ridges": (1e-1, 1.0), "scouts": 4}),
    ),
    "full": Effort(windows=16, validation=4, scouted=4),
}
#: What is done if nothing is said.
DEFAULT = "fast"
