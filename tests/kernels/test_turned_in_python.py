"""``hopper_turned.py`` run as Python: blocks, barriers, buffers and what its products are made of."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernel is written in Gluon, which Triton brings")
from triton.experimental.gluon import language as gl

from mlacompile.kernels.mla_decode import (
    hopper_fetch,
    hopper_plan,
    hopper_room,
    hopper_rows,
    hopper_turned,
    hopper_turned_by_tokens,
    hopper_turned_by_turns,
    hopper_turned_fetch,
    hopper_turned_groups,
    hopper_turned_moved,
    hopper_turned_room,
    hopper_turned_rows,
    hopper_turned_scores,
    hopper_turned_shares,
    hopper_turned_token_rows,
    hopper_turned_token_scores,
    hopper_turned_values,
    hopper_turned_wide,
    hopper_turned_words,
    merge,
)
from mlacompile.kernels.mla_decode.plan import HopperPlan
from mlacompile.testing.latents import (
    Exact,
    LatentCase,
    LatentInputs,
    exact,
    in_one_run,
    least_of,
    least_of_e4m3,
    make_inputs,
    paged,
    quantized,
    sloped,
    worst,
)
from tests.kernels import gluon_in_python, mla_in_python, wrong_in_python

MODULES = [
    hopper_fetch, hopper_plan, hopper_room, hopper_rows, hopper_turned, hopper_turned_by_tokens, hopper_turned_by_turns,
    hopper_turned_fetch, hopper_turned_groups, hopper_turned_moved, hopper_turned_room, hopper_turned_rows,
    hopper_turned_scores, hopper_turned_shares, hopper_turned_token_rows, hopper_turned_token_scores,
    hopper_turned_values, hopper_turned_wide, hopper_turned_words, merge,
]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, inputs: LatentInputs, plan: HopperPlan) -> tuple[Tensor, Tensor]:
    return mla_in_python.decode(monkeypatch, MODULES, inputs, plan)


CASE = LatentCase(batch=2, heads=16, tokens=300, rank=512, rope=64, dtype=torch.float16)
RAGGED: dict[str, Any] = {"start": True, "length": True, "poison": True}
#: In wide tiles, with one factor a token or several: tokens of a page, 0 for a contiguous cache, and programs that
#: share a row.
WIDE = [
    (replace(CASE, heads=40, **RAGGED), 64, 3),
    (replace(CASE, heads=50, queries=2, causal=True, rank=384, **RAGGED), 0, 1),
    (replace(CASE, heads=33, batch=9, rank=256, rope=0, tokens=180, **RAGGED), 32, 1),
]
#: With the tokens of a page, 0 for a contiguous cache, programs that share a row, and how many rows a tile may have:
#: stacked queries and not.
CASES = [
    (replace(CASE, **RAGGED), 64, 3, 64),
    (replace(CASE, heads=72, batch=1, tokens=200), 0, 1, 64),
    (replace(CASE, heads=9, batch=1, tokens=700), 64, 5, 64),  # one batch row: 11 blocks by 5 programs, a part has 3
    (replace(CASE, heads=5, queries=5, rank=256, rope=32, causal=True, **RAGGED), 32, 1, 64),
    (replace(CASE, heads=40, queries=2, rope=0, causal=True, tokens=130), 64, 2, 64),
    (replace(CASE, heads=36, queries=2, rank=256, rope=32, causal=True, **RAGGED), 32, 2, 64),
    (replace(CASE, heads=33, batch=9, tokens=180, **RAGGED), 64, 1, 64),  # one to three blocks: groups sit items out
    *((*x, 64) for x in WIDE),
    (replace(CASE, heads=72, batch=1, tokens=200), 64, 2, 32),
    (replace(CASE, heads=36, queries=2, causal=True, **RAGGED), 64, 3, 32),
    (replace(CASE, heads=50, rank=256, rope=16, **RAGGED), 0, 1, 32),
]


#: With several factors a token: two, three and four groups of columns, the last of them not whole, too.
GROUPED = [
    (replace(CASE, **RAGGED), 64, 3),
    (replace(CASE, heads=7, queries=4, causal=True, **RAGGED), 32, 1),
    (replace(CASE, heads=5, queries=5, rank=256, rope=32, causal=True, **RAGGED), 0, 2),
    (replace(CASE, heads=20, rank=384, tokens=200, **RAGGED), 64, 1),
    (replace(CASE, heads=1, rank=272, rope=0, tokens=130), 0, 2),
    (replace(CASE, batch=5, heads=9, rank=144, rope=0, **RAGGED), 128, 2),
    (replace(CASE, heads=72, batch=1, **RAGGED), 64, 2),
]


#: What a score may be off by, of the sum of magnitudes in it, where its sixteen sums are float16: each is rounded.
IN_FLOAT16 = 16 * 2**-11


def agree(out: Tensor, lse: Tensor, want: Exact, *, apart: bool = False) -> None:
    """Weights and values in float16, queries in two FP8 values. If scores are sums in float16, they are off by
    2^-11 / sqrt(3) of a sum sixteen times, which is 1.7 * 2^-11 of all of it, three times that at most among so many.
    """
    assert (out.double() - want.out).norm() / want.out.norm() < 3e-3
    atol = 2e-3 + (3 * 1.7 * 2**-11 * 1.7 if apart else 0)  # the standard deviation of scores is 1.7
    assert torch.allclose(lse.double(), want.lse, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "page", "parts", "tile_rows", "apart"),
    [
        *((*x, False) for x in CASES),
        *((*x, True) for x in CASES if x[3] == 64 and x[0].heads * x[0].queries > 32),
    ],
    ids=str,
)
def test_parity(
    monkeypatch: pytest.MonkeyPatch, case: LatentCase, page: int, parts: int, tile_rows: int, apart: bool
) -> None:
    stored, said = quantized(make_inputs(case))
    want = exact(said)
    plan = HopperPlan(parts, turned=True, tile_rows=tile_rows, apart=apart)
    out, lse = run(monkeypatch, paged(stored, page) if page else stored, plan)
    agree(out, lse, want, apart=apart)


@pytest.mark.parametrize("apart", [False, True])
def test_weights_of_long_rows_are_rounded_once(monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    """A weight of one e4m3 value is off by 2^-4 of itself at most; below the limit it is float16."""
    case = replace(CASE, heads=40, batch=4, tokens=300, **RAGGED)
    stored, said = quantized(make_inputs(case))
    want = exact(said, operand_unit=2**-4, key_unit=IN_FLOAT16 if apart else 0.0)
    first, length = said.tensors[5], said.tensors[6]
    assert first is not None and length is not None  # noqa: PT018
    seen = (length - first.clamp(min=0)).clamp(min=0)
    out, _ = run(monkeypatch, paged(stored, 64), HopperPlan(1, turned=True, coarse_from=150, apart=apart))
    error = ((out.double() - want.out).flatten(1).norm(dim=1) / want.out.flatten(1).norm(dim=1)).nan_to_num(0)
    assert (seen >= 150).any() and (seen < 150).any()  # noqa: PT018
    assert not worst(out, want.out, want.out_bound)
    assert (error[seen >= 150] > 5e-3).all(), "as exact as float16"
    assert (error[seen < 150] < 3e-3).all()
    monkeypatch.setattr(hopper_turned_room, "COARSE_BLOCKS", gl.constexpr(2))
    out, _ = run(monkeypatch, paged(stored, 64), HopperPlan(1, turned=True, coarse_from=150, apart=apart))
    assert (out.double() - want.out).norm() / want.out.norm() < 3e-3, "more than two blocks are not added up in FP8"


@pytest.mark.parametrize(
    ("coarse_from", "tile_rows", "apart"),
    [(0, 64, False), (1000, 64, False), (1000, 32, False), (0, 64, True), (1000, 64, True)],
)
@pytest.mark.parametrize("slope", [-3.0, -0.4, 0.4, 3.0])
def test_scores_that_rise_or_fall_all_along(
    monkeypatch: pytest.MonkeyPatch, slope: float, coarse_from: int, tile_rows: int, apart: bool
) -> None:
    """Up to 1300 powers of two between the first token and the last."""
    stored, said = quantized(sloped(make_inputs(replace(CASE, heads=40, batch=1, tokens=300, rope=0)), slope))
    want = exact(
        said, unit=2**-22, operand_unit=2**-11 if coarse_from else 2**-4, key_unit=IN_FLOAT16 if apart else 0.0
    )
    plan = HopperPlan(1, turned=True, coarse_from=coarse_from, tile_rows=tile_rows, apart=apart)
    out, lse = run(monkeypatch, stored, plan)
    bound = want.out_bound + least_of(out.dtype)
    if not coarse_from:
        bound = bound + least_of_e4m3(stored, said)
    assert not worst(out, want.out, bound), worst(out, want.out, bound)
    assert not worst(lse, want.lse, want.lse_bound), worst(lse, want.lse, want.lse_bound)


@pytest.mark.parametrize(
    ("heads", "per", "coarse_from", "tile_rows", "apart"),
    [
        (16, "token", 1000, 64, False),
        (40, "token", 0, 64, False),
        (64, "token", 1000, 64, False),
        (64, "token", 0, 32, False),
        (9, "block", 0, 64, False),
        (40, "token", 0, 64, True),
        (64, "token", 1000, 64, True),
    ],
)
def test_only_groups_of_rows_that_moved_are_multiplied(
    monkeypatch: pytest.MonkeyPatch, heads: int, per: str, coarse_from: int, tile_rows: int, apart: bool
) -> None:
    """Scores far apart: in most blocks some rows have a new maximum, and not all."""
    inputs = make_inputs(replace(CASE, heads=heads, batch=1, tokens=900, rope=0))
    q_latent = inputs.tensors[0]
    assert q_latent is not None
    q_latent.mul_(6)
    stored, said = quantized(inputs, per=per)
    seen = mla_in_python.moved_groups(monkeypatch)
    stored = stored if per == "token" else in_one_run(stored)
    plan = HopperPlan(1, turned=True, coarse_from=coarse_from, tile_rows=tile_rows, apart=apart)
    out, lse = run(monkeypatch, stored, plan)
    coarse = heads > 32 and tile_rows == 64 and not coarse_from
    # Queries are two values of e4m3, which is off by as much as if keys were.
    want = exact(said, unit=2**-22, operand_unit=2**-4 if coarse else 2**-11, key_unit=2**-9 + IN_FLOAT16 * apart)
    bound = want.out_bound + (least_of_e4m3(stored, said) if coarse else 0.0)
    assert not worst(out, want.out, bound), worst(out, want.out, bound)
    assert (out.double() - want.out).norm() / want.out.norm() < (2**-4 if coarse else 2e-2 if apart else 3e-3)
    assert not worst(lse, want.lse, want.lse_bound), worst(lse, want.lse, want.lse_bound)
    groups = min(-(-heads // 16) * 16, tile_rows, 64) // 8
    assert set(seen) - {0, (1 << groups) - 1}, seen


@pytest.mark.parametrize("apart", [False, True])
def test_the_first_token_is_taken_last(monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    """The first token has a thousand times the weight of any other, all others together more than it: of their P in
    e4m3 little would be left, counted from the first."""
    inputs = make_inputs(replace(CASE, heads=40, batch=1, tokens=1024, rope=0))
    q_latent, _, c_kv, *_ = inputs.tensors
    assert q_latent is not None and c_kv is not None  # noqa: PT018
    q_latent[..., 0], c_kv[..., 0], c_kv[:, 0, 0] = 8.0, 0.0, 7 / (8 * inputs.keywords["scale"])
    stored, said = quantized(inputs)
    out, _ = run(monkeypatch, stored, HopperPlan(1, turned=True, coarse_from=0, apart=apart))
    want = exact(said).out[..., 1:]
    assert (out.double()[..., 1:] - want).norm() / want.norm() < 3e-2, "what weights in e4m3 cost so many tokens"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("coarse_from", [0, 1000])
def test_nan_in_a_live_row_reaches_the_output(monkeypatch: pytest.MonkeyPatch, coarse_from: int, apart: bool) -> None:
    stored, _ = quantized(make_inputs(replace(CASE, heads=40, batch=3, tokens=200)))
    c_kv, descale = stored.tensors[2], stored.tensors[8]
    assert c_kv is not None and descale is not None  # noqa: PT018
    c_kv.view(torch.uint8)[0, 130, 77] = 0x7F
    descale[1, 3] = math.nan
    out, lse = run(monkeypatch, stored, HopperPlan(1, turned=True, coarse_from=coarse_from, apart=apart))
    assert out[:2].isnan().all()
    assert lse[:2].isnan().all()
    assert not out[2].isnan().any()


@pytest.mark.parametrize(
    ("case", "page", "parts", "tile_rows"),
    [
        *((*x, 32) for x in GROUPED),
        *((*x, 64) for x in [*(x for x in GROUPED if x[0].heads * x[0].queries > 16), *WIDE]),
    ],
    ids=str,
)
def test_several_factors_a_token(
    monkeypatch: pytest.MonkeyPatch, case: LatentCase, page: int, parts: int, tile_rows: int
) -> None:
    """In wide tiles both parts of the queries have scores of their own."""
    stored, said = quantized(make_inputs(case), per="block", rounded=False)
    want = exact(said)
    stored = in_one_run(paged(stored, page) if page else stored)
    out, lse = run(monkeypatch, stored, HopperPlan(parts, turned=True, tile_rows=tile_rows))
    agree(out, lse, want, apart=min(case.heads * case.queries, tile_rows) > 32)


@pytest.mark.parametrize(
    ("heads", "per", "batch", "coarse", "tile_rows", "apart"),
    [
        (16, "token", 1, False, 64, False),
        (64, "token", 1, False, 64, False),
        (64, "token", 9, False, 64, False),
        (64, "token", 1, True, 64, False),
        (64, "token", 9, True, 64, False),
        (64, "token", 9, False, 64, True),
        (64, "token", 1, True, 64, True),
        (64, "token", 9, True, 64, True),
        (16, "block", 1, False, 64, False),
        (64, "block", 1, False, 64, False),
        (40, "block", 7, False, 64, True),
        (72, "token", 2, False, 32, False),
    ],
)
def test_nobody_is_waited_for_too_little(
    monkeypatch: pytest.MonkeyPatch, heads: int, per: str, batch: int, coarse: bool, tile_rows: int, apart: bool
) -> None:
    """Whoever is late, the result is the same to the bit: a stage or a buffer given back too early shows here."""
    case = replace(CASE, heads=heads, batch=batch, tokens=900 // batch, length=batch > 1)
    stored, _ = quantized(make_inputs(case), per=per, rounded=per == "token")
    stored = paged(stored, 64) if per == "token" else in_one_run(paged(stored, 64))
    plan = HopperPlan(1, turned=True, coarse_from=60 if coarse else 1000, tile_rows=tile_rows, apart=apart)
    want = run(monkeypatch, stored, plan)
    for seed in range(3):
        with monkeypatch.context() as late:
            gluon_in_python.dawdle(late, seed)
            assert all(torch.equal(x, y) for x, y in zip(run(late, stored, plan), want, strict=True))


@pytest.mark.parametrize(
    ("module", "function", "heads", "per", "apart"),
    [
        (hopper_turned_values, "_values", 40, "token", False),
        (hopper_turned_words, "_clear_dead_words", 40, "token", False),
        (hopper_turned_scores, "_publish", 16, "token", False),
        (hopper_turned_groups, "_publish_groups", 16, "block", False),
        (hopper_turned_by_turns, "_scores_by_turns", 64, "token", False),
        (hopper_turned_by_tokens, "_scores_by_tokens", 64, "token", True),
    ],
    ids=lambda x: "" if isinstance(x, ModuleType) else None,
)
def test_a_fence_that_is_left_out_is_found(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str, heads: int, per: str, apart: bool
) -> None:
    case = replace(CASE, heads=heads, batch=1, tokens=700 if function == "_clear_dead_words" else 192)
    stored, _ = quantized(make_inputs(case), per=per)
    wrong_in_python.rewrite(monkeypatch, module, function, ("fence_async_shared()", "pass"))
    stored = stored if per == "token" else in_one_run(stored)
    with pytest.raises(AssertionError, match="without a fence"):
        run(monkeypatch, stored, HopperPlan(1, turned=True, apart=apart))
