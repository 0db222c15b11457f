"""What the compiler makes of the kernel, on any machine: wgmma and TMA on Hopper, nothing in local memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mlacompile.kernels.mla_decode.launch import launches
from mlacompile.kernels.mla_decode.plan import Device, Plan, Shape, choose_plan
from mlacompile.testing.sass import Compiled, compile_for, table

SHAPE = Shape(batch=4, heads=128, queries=1, tokens=8192, rank=512, rope=64)
SMEM = Device().smem


def build(plan: Plan, capability: int = 90, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    """The main kernel of SHAPE, with lengths, from one fused cache, as it would be launched."""

    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    b, h, s, t, r, p = SHAPE.batch, SHAPE.heads, SHAPE.queries, SHAPE.tokens, SHAPE.rank, SHAPE.rope
    cache, length = meta(b, t, r + p), meta(b, dtype=torch.int32)
    tensors = (meta(b, h, s, r), meta(b, h, s, p), cache[..., :r], cache[..., r:], None, None, length)
    out, lse = meta(b, h, s, r), meta(b, h, s, dtype=torch.float32)
    launch = launches(tensors, out, lse, plan, scale=0.1, causal=False)[0]
    name = f"{plan} {str(dtype).removeprefix('torch.')} sm_{capability}"
    built = compile_for(launch.kernel, launch.arguments, launch.options, capability=capability, name=name)
    print(table([built]))
    return built


def test_default_plan_on_hopper() -> None:
    built = build(choose_plan(SHAPE, Device()))
    assert built.counts["HGMMA"] > 0
    assert built.counts["HMMA"] == 0
    assert built.counts["UTMALDG"] > 0
    assert built.local_memory == 0
    assert built.spill_bytes == 0
    assert built.serialized == 0
    assert built.smem <= SMEM


def test_pointer_loads_on_hopper() -> None:
    built = build(Plan(64, 64, 8, 2, wide=True))
    assert built.counts["HGMMA"] > 0
    assert built.counts["LDGSTS"] > 0, "tiles should come by cp.async"
    assert built.local_memory == 0
    assert built.smem <= SMEM


def test_float32_stays_float32() -> None:
    built = build(choose_plan(Shape(4, 128, 1, 8192, 512, 64, itemsize=4), Device()), dtype=torch.float32)
    assert built.counts["HGMMA"] == built.counts["HMMA"] == 0
    assert built.local_memory == 0


def test_ampere() -> None:
    ampere = Device((8, 0), 108, 166_912)
    built = build(choose_plan(SHAPE, ampere), capability=80)
    assert built.counts["HMMA"] > 0
    assert built.local_memory == 0
    assert built.smem <= ampere.smem
