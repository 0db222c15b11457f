"""``mla_decode`` by a Hopper kernel that runs as Python, and which rows it found to have moved."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from mlacompile.kernels.mla_decode import hopper_launch, hopper_rows
from mlacompile.kernels.mla_decode.hopper_launch import hopper_launches
from mlacompile.kernels.mla_decode.plan import HopperPlan
from mlacompile.testing.latents import LatentInputs
from tests.kernels import gluon_in_python


def moved_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What ``_moved`` will find, bit by bit, for every block and partition that asks."""
    found: list[int] = []
    moved = hopper_rows._moved.fn

    def recorded(alpha: Any) -> Any:
        groups = moved(alpha)
        found.append(int(groups))
        return groups

    monkeypatch.setattr(hopper_rows._moved, "fn", recorded)
    return found


def decode(
    monkeypatch: pytest.MonkeyPatch, modules: list[ModuleType], inputs: LatentInputs, plan: HopperPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel of these modules, and the merge. What is not written is NaN."""
    q_latent, q_pe, c_kv, k_pe, _, start, length, table, descale, *_ = (*inputs.tensors, None, None)
    assert q_latent is not None
    tensors = (q_latent, q_pe, c_kv, k_pe, start, length, table, descale)
    out = torch.full(q_latent.shape, math.nan, dtype=q_latent.dtype)
    lse = torch.full(q_latent.shape[:3], math.nan)
    # Memory of a CPU begins anywhere.
    monkeypatch.setattr(hopper_launch, "in_whole_lines", lambda t: t.stride(0) * t.itemsize % 128 == 0)
    launches = hopper_launches(tensors, out, lse, plan, **inputs.keywords)
    for name in ("p_part", "p_part_lse"):
        launches[0].arguments[name].view(torch.uint8).fill_(255)
    for launch in launches:
        gluon_in_python.run(modules, launch)
    return out, lse
