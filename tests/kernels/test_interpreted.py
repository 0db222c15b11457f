"""The kernel's logic, run by Triton's interpreter in float32: masks, bounds, tails, splits, poison."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

RAGGED = {"start": True, "length": True, "poison": True}
CASES: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {},
        {"fused": True, "heads": 20},
        {"rope": 0, "rank": 24},
        {"tokens": 5},
        {"tokens": 64, "rank": 64},
    ],
    "ragged": [
        RAGGED,
        {**RAGGED, "fused": True, "heads": 17},
        {**RAGGED, "tokens": 12},
        {**RAGGED, "tokens": 21},
    ],
    "causal": [
        {"queries": 3, "causal": True, **RAGGED},
        {"queries": 5, "causal": True, "heads": 5, "length": True, "tokens": 40},
    ],
    "paged": [
        {"page": 16, **RAGGED},
        {"page": 32, "fused": True, "tokens": 90, **RAGGED},
        {"page": 16, "queries": 3, "causal": True, "heads": 20, "length": True, "poison": True},
        {"page": 64, "rope": 0},
    ],
    "fp8": [
        {"fp8": {"per": "token"}, **RAGGED},
        {"fp8": {"per": "block"}, "rank": 200, "heads": 20, **RAGGED},
        {"fp8": {"per": "block", "rope": True}, "rank": 128, "page": 16, **RAGGED},
        {"fp8": {"per": "token", "rope": True}, "queries": 3, "causal": True, **RAGGED},
    ],
    "masked": [
        {"mask": "bool", "poison": True},
        {"mask": "bool", "queries": 4, **RAGGED},
        {"mask": "additive", "queries": 3, "causal": True, **RAGGED},
        {"mask": "additive", "poison": True},
        {"mask": "shared", "queries": 2, "heads": 16, **RAGGED},
    ],
}
TILE = {"block_h": 16, "block_n": 16, "num_warps": 4, "num_stages": 2}
#: Families that run in one process: it imports for longer than a family takes.
TOGETHER = (("plain", "ragged", "causal"), ("paged", "fp8", "masked"))
PLANS: list[dict[str, Any]] = [TILE, {**TILE, "splits": 3}]
TMA_PLANS: list[dict[str, Any]] = [{**TILE, "tma": True}, {**TILE, "tma": True, "block_n": 32, "splits": 2}]


@pytest.mark.parametrize("families", TOGETHER, ids=" ".join)
def test_kernel_logic(families: tuple[str, ...]) -> None:
    assert sorted(family for some in TOGETHER for family in some) == sorted(CASES)
    script = Path(__file__).with_name("interpreted.py")
    runs = [
        (case, plan)
        for family in families
        for case in CASES[family]
        for plan in (PLANS if family in ("masked", "paged", "fp8") else [*PLANS, *TMA_PLANS])
    ]
    done = subprocess.run([sys.executable, script, repr(runs)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
