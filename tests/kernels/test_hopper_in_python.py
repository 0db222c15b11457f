"""``hopper.py`` and ``hopper_in_place.py`` run as Python: blocks, barriers, parts of a stage, what is multiplied."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernel is written in Gluon, which Triton brings")

from mlacompile.kernels.mla_decode import (
    hopper,
    hopper_fetch,
    hopper_in_place,
    hopper_plan,
    hopper_right,
    hopper_room,
    hopper_rows,
    merge,
    widen,
)
from mlacompile.kernels.mla_decode.hopper_launch import hopper_launches
from mlacompile.kernels.mla_decode.plan import HopperPlan
from mlacompile.testing.latents import LatentCase, exact, in_one_run, make_inputs, paged, quantized, worst
from tests.kernels import gluon_in_python, mla_in_python, wrong_in_python

MODULES = [hopper, hopper_fetch, hopper_in_place, hopper_plan, hopper_right, hopper_room, hopper_rows, merge, widen]

CASE = LatentCase(batch=2, heads=16, tokens=300, rank=512, rope=64, dtype=torch.float16)
RAGGED: dict[str, Any] = {"start": True, "length": True, "poison": True}
#: With the tokens of a page, 0 for a contiguous cache, and programs that share a row: one tile of 64 rows, and several,
#: whose left columns come in halves.
CASES = [
    (replace(CASE, **RAGGED), 64, 3),
    (replace(CASE, heads=128, **RAGGED), 64, 3),
    (replace(CASE, heads=72, batch=1, tokens=700, fused=True), 0, 5),
    (replace(CASE, heads=40, queries=2, causal=True, **RAGGED), 32, 2),
    (replace(CASE, heads=5, queries=5, rank=256, rope=32, causal=True, **RAGGED), 128, 1),
    (replace(CASE, heads=100, rank=384, rope=0, tokens=130, **RAGGED), 16, 1),
    (replace(CASE, heads=70, rank=128, rope=16, batch=9, tokens=180, **RAGGED), 64, 1),
    (replace(CASE, heads=1, rank=96, tokens=65), 0, 1),
]


def parity(monkeypatch: pytest.MonkeyPatch, case: LatentCase, page: int, parts: int) -> None:
    said = make_inputs(case)
    want = exact(said)
    plan = HopperPlan(parts)
    out, lse = mla_in_python.decode(monkeypatch, MODULES, paged(said, page) if page else said, plan)
    assert (out.double() - want.out).norm() / want.out.norm() < 1e-3
    assert torch.allclose(lse.double(), want.lse, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("case", "page", "parts"), CASES, ids=str)
def test_parity(monkeypatch: pytest.MonkeyPatch, case: LatentCase, page: int, parts: int) -> None:
    parity(monkeypatch, case, page, parts)


@pytest.mark.parametrize("heads", [16, 72])
def test_earlier_output_is_multiplied_only_where_a_row_moved(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    """Scores so far apart that some rows exceed what they count from by 2^6, in some blocks and not in all."""
    said = make_inputs(replace(CASE, heads=heads, batch=1, tokens=900))
    q_latent, q_pe, *_ = said.tensors
    assert q_latent is not None and q_pe is not None  # noqa: PT018
    q_latent.mul_(6), q_pe.mul_(6)
    seen = mla_in_python.moved_groups(monkeypatch)
    out, lse = mla_in_python.decode(monkeypatch, MODULES, said, HopperPlan(1))
    want = exact(said)
    assert (out.double() - want.out).norm() / want.out.norm() < 1e-3
    assert torch.allclose(lse.double(), want.lse, atol=1e-3, rtol=1e-4)
    assert 0 in seen, "something is multiplied for every block"
    assert any(seen), "nothing ever moves"


#: The same on an FP8 cache, and what its factors are for.
FP8_CASES = [
    (replace(CASE, **RAGGED), 64, 3, {"per": "token"}),
    (replace(CASE, heads=72, **RAGGED), 64, 1, {"per": "block"}),
    (replace(CASE, heads=20, queries=2, causal=True, **RAGGED), 16, 2, {"per": "block", "dtype": torch.float8_e5m2}),
    (
        replace(CASE, heads=5, rank=256, rope=32, batch=1, tokens=700),
        0,
        5,
        {"per": "token", "dtype": torch.float8_e5m2},
    ),
    (replace(CASE, heads=20, rank=384, rope=0, tokens=130, **RAGGED), 0, 1, {"per": "block"}),
]


@pytest.mark.parametrize(("case", "page", "parts", "fp8"), FP8_CASES, ids=str)
def test_fp8_parity(
    monkeypatch: pytest.MonkeyPatch, case: LatentCase, page: int, parts: int, fp8: dict[str, Any]
) -> None:
    stored, said = quantized(make_inputs(case), rounded=False, **fp8)
    stored = in_one_run(stored) if fp8["per"] == "block" else stored
    want = exact(said)
    out, lse = mla_in_python.decode(monkeypatch, MODULES, paged(stored, page) if page else stored, HopperPlan(parts))
    assert (out.double() - want.out).norm() / want.out.norm() < 1e-3
    assert torch.allclose(lse.double(), want.lse, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads", [16, 72])
def test_whoever_is_late(monkeypatch: pytest.MonkeyPatch, seed: int, heads: int) -> None:
    """Late partitions, products and copies change nothing."""
    with monkeypatch.context() as late:
        gluon_in_python.dawdle(late, seed)
        parity(monkeypatch, replace(CASE, heads=heads, tokens=400, **RAGGED), 64, 2)


@pytest.mark.parametrize(("parts", "room"), [(1, 2), (33, 32), (64, 64), (66, 64), (70, 64), (71, 128), (132, 128)])
def test_partials_that_are_merged_at_once(parts: int, room: int) -> None:
    """A few more than a power of two have a second round, not twice the room."""
    tensors = (torch.empty(1, 64, 1, 512, dtype=torch.float16), None, torch.empty(1, 64, 512, dtype=torch.float16))
    out, lse = torch.empty(1, 64, 1, 512, dtype=torch.float16), torch.empty(1, 64, 1)
    launches = hopper_launches((*tensors, None, None, None, None, None), out, lse, HopperPlan(parts), scale=1.0,
                               causal=False)  # fmt: skip
    assert [x.arguments["SLOTS"] for x in launches[1:]] == ([room] if parts > 1 else [])


@pytest.mark.parametrize("live", [0, 1, 64, 65, 130, 700])
def test_one_batch_row_of_any_length(monkeypatch: pytest.MonkeyPatch, live: int) -> None:
    """Its partials are sent for before it is known how many were written: the others are NaN."""
    said = make_inputs(replace(CASE, heads=9, batch=1, tokens=700))
    said.tensors = (*said.tensors[:6], torch.tensor([live], dtype=torch.int32))
    want = exact(said, operand_unit=2**-11)
    out, lse = mla_in_python.decode(monkeypatch, MODULES, said, HopperPlan(5))
    assert not worst(out, want.out, want.out_bound), worst(out, want.out, want.out_bound)
    assert not worst(lse, want.lse, want.lse_bound), worst(lse, want.lse, want.lse_bound)


@pytest.mark.parametrize(
    ("module", "function", "line", "per"),
    [
        (hopper, "_left", "        fence_async_shared()\n", ""),
        (hopper, "_store_p", "        fence_async_shared()\n", "token"),
        (hopper_right, "_right", "        fence_async_shared()\n", ""),
        (hopper_rows, "_clear_dead", "    fence_async_shared()\n", ""),
        (hopper_in_place, "_widen", "fence_async_shared()\n            mbarrier.arrive(bar.last_full", "token"),
    ],
    ids=lambda x: "" if isinstance(x, ModuleType) else None,
)
def test_a_fence_that_is_left_out_is_found(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str, line: str, per: str
) -> None:
    said = make_inputs(replace(CASE, batch=1, tokens=60 if function == "_clear_dead" else 64))
    wrong_in_python.rewrite(monkeypatch, module, function, (line, line.replace("fence_async_shared()", "pass")))
    with pytest.raises(AssertionError, match="without a fence"):
        mla_in_python.decode(monkeypatch, MODULES, quantized(said, per=per)[0] if per else said, HopperPlan(1))
