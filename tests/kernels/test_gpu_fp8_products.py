"""The Hopper kernel with FP8 products on a GPU against float64 over what its cache says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlacompile.kernels.mla_decode.plan import COARSE_FROM, NARROW_ROWS
from mlacompile.kernels.mla_decode.supports import hopper_shape_reasons, turned_reasons
from mlacompile.ops import mla_decode
from mlacompile.testing.latents import (
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

#: Unit roundoff of what the output is stored in; P is float16.
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
#: A sum of FP8 products drops what lies 2^13 below its largest addend: 33 addends a step, 32 steps, errors of either
#: sign, 2^-13 * sqrt(33 * 32 / 3) of a sum that is a twentieth of its addends' sizes, and five times that at worst.
SUM_UNIT = 2**-10
#: What a score may be off by, of the sum of magnitudes in it, where its sixteen sums are float16.
IN_FLOAT16 = 16 * 2**-11
#: The bound on the norm of the error that other kernels keep with products in 16 bits.
NORM = 3e-3
#: Roundoff of P where it is one e4m3 value, and what is asked of products in FP8 then.
COARSE_UNIT, COARSE_NORM = 2**-4, 2e-2

DEEPSEEK = LatentCase(batch=3, heads=16, tokens=1000, rank=512, rope=64, dtype=torch.bfloat16)
RAGGED: dict[str, Any] = {"start": True, "length": True, "poison": True}


def variant(**changes: Any) -> LatentCase:
    return replace(DEEPSEEK, **changes)


#: And the tokens of a page, 0 for a contiguous cache.
CASES = [
    *((variant(heads=heads, **RAGGED), 64) for heads in (1, 3, 16, 20, 40, 64, 128, 130)),
    *((variant(heads=heads, queries=s, causal=True, **RAGGED), 64) for heads, s in ((16, 4), (128, 2), (128, 5))),
    *((variant(tokens=tokens, length=True, poison=True), 64) for tokens in (1, 63, 65)),
    (variant(heads=128, **RAGGED), 0),
    (variant(batch=1, tokens=67), 0),
    (variant(batch=1, tokens=20_000, heads=128), 64),
    (variant(batch=300, tokens=130, heads=130, **RAGGED), 256),
    (variant(rank=256, rope=0, **RAGGED), 32),
    (variant(heads=7, rank=128, **RAGGED), 0),
    (variant(heads=64, rank=384, rope=0, dtype=torch.float16, **RAGGED), 0),
    (variant(queries=8, rank=256, rope=32, causal=True, **RAGGED), 128),
    (variant(heads=128, dtype=torch.float16, **RAGGED), 64),
]


#: With a factor for each 128 columns and all of a token in one run of bytes: contiguous and in pages.
GROUPED = [
    *((variant(heads=heads, **RAGGED), page) for heads in (1, 3, 16, 20, 32) for page in (0, 64)),
    *(
        (variant(heads=heads, queries=s, causal=True, **RAGGED), page)
        for heads, s in ((16, 2), (8, 4), (5, 4), (10, 3), (4, 4))
        for page in (0, 64)
    ),
    *((variant(tokens=tokens, length=True, poison=True), page) for tokens in (1, 63, 65) for page in (0, 64)),
    (variant(batch=1, tokens=67), 0),
    (variant(batch=1, tokens=20_000), 64),
    (variant(batch=300, tokens=130, heads=20, **RAGGED), 256),
    (variant(batch=70, tokens=700, **RAGGED), 0),
    (variant(rank=256, rope=0, **RAGGED), 32),
    (variant(heads=7, rank=144, **RAGGED), 0),
    (variant(heads=20, rank=256, rope=32, queries=1, dtype=torch.float16, **RAGGED), 128),
    (variant(heads=32, rank=384, dtype=torch.float16, **RAGGED), 64),
    (variant(heads=9, rank=320, rope=0, **RAGGED), 0),
    (variant(heads=16, dtype=torch.float16, **RAGGED), 64),
    (variant(heads=16, rope=0, **RAGGED), 64),
    *((variant(heads=heads, **RAGGED), page) for heads in (40, 64, 128) for page in (0, 64)),
    (variant(heads=128, queries=2, causal=True, **RAGGED), 64),
    (variant(batch=1, tokens=20_000, heads=128), 64),
    (variant(batch=300, tokens=130, heads=130, **RAGGED), 256),
    (variant(heads=50, rank=256, rope=0, **RAGGED), 32),
    (variant(heads=64, rank=384, dtype=torch.float16, **RAGGED), 64),
    (variant(heads=128, dtype=torch.float16, **RAGGED), 64),
]


def stored_as(inputs: LatentInputs, per: str, page: int = 0) -> tuple[LatentInputs, LatentInputs]:
    """The same call on an FP8 cache, all of a token in one run of bytes if it has several factors, and what it says."""
    stored, said = quantized(inputs, per=per, rounded=False)
    stored = paged(stored, page) if page else stored
    return in_one_run(stored) if per == "block" else stored, said


#: Those of more than one narrow tile, which have both parts of their queries on the right in batches of long rows.
APART = [x for x in CASES if x[0].heads * x[0].queries > NARROW_ROWS]


def is_coarse(case: LatentCase) -> bool:
    return case.heads * case.queries > NARROW_ROWS and case.tokens >= COARSE_FROM


def turned(inputs: LatentInputs, tile_rows: int = 64, **changes: int) -> tuple[Tensor, Tensor]:
    """The kernel, three times over: a result that changes is a race. changes: of its plan."""
    from mlacompile.kernels.mla_decode.hopper_launch import hopper_launches, hopper_shape
    from mlacompile.kernels.mla_decode.launch import device_of
    from mlacompile.kernels.mla_decode.plan import hopper_plan

    q_latent, q_pe, c_kv, k_pe, mask, start, length, table, descale = inputs.tensors
    assert q_latent is not None
    assert c_kv is not None
    assert descale is not None
    assert not hopper_shape_reasons(q_latent, q_pe, c_kv, k_pe, mask, table, descale, inputs.keywords["scale"])
    assert not turned_reasons(c_kv)
    tensors = (q_latent, q_pe, c_kv, k_pe, start, length, table, descale)
    plan = hopper_plan(hopper_shape(tensors), device_of(q_latent.device), tile_rows)
    plan = replace(plan, turned=True, **changes)
    results = []
    for _ in range(3):
        out = q_latent.new_full(q_latent.shape, math.nan)  # contiguous, whatever the queries are
        lse = q_latent.new_full(q_latent.shape[:3], math.nan, dtype=torch.float32)
        for launch in hopper_launches(tensors, out, lse, plan, **inputs.keywords):
            launch()
        results.append((out, lse))
    assert all(torch.equal(out.nan_to_num(7), results[0][0].nan_to_num(7)) for out, _ in results)
    return results[0]


def check(said: LatentInputs, out: Tensor, lse: Tensor, *, coarse: bool = False, apart: bool = False) -> None:
    operand_unit = COARSE_UNIT if coarse else UNIT[out.dtype]
    want = exact(said, unit=2**-22, operand_unit=operand_unit, key_unit=SUM_UNIT + IN_FLOAT16 * apart)
    assert not worst(out, want.out, want.out_bound), f"out: {worst(out, want.out, want.out_bound)}"
    assert not worst(lse, want.lse, want.lse_bound), f"lse: {worst(lse, want.lse, want.lse_bound)}"
    if want.out.norm() > 0:
        assert (out.double() - want.out).norm() / want.out.norm() <= (COARSE_NORM if coarse else NORM)


@pytest.mark.parametrize(("case", "page"), CASES, ids=lambda x: f"page{x}" if isinstance(x, int) else str(x))
def test_parity(case: LatentCase, page: int) -> None:
    stored, said = quantized(make_inputs(case, device="cuda"))
    check(said, *turned(paged(stored, page) if page else stored), coarse=is_coarse(case))


@pytest.mark.parametrize(("case", "page"), APART, ids=lambda x: f"page{x}" if isinstance(x, int) else str(x))
def test_parity_of_both_parts_at_once(case: LatentCase, page: int) -> None:
    stored, said = quantized(make_inputs(case, device="cuda"))
    out, lse = turned(paged(stored, page) if page else stored, apart=True)
    check(said, out, lse, coarse=is_coarse(case), apart=True)


#: More rows than fit into a tile of 32.
NARROW = [
    *(variant(batch=1, heads=heads, tokens=tokens) for heads in (40, 128) for tokens in (1, 700, 8192, 20_000)),
    variant(heads=130, **RAGGED),
    variant(heads=24, queries=4, causal=True, **RAGGED),
    variant(batch=70, heads=64, tokens=700, **RAGGED),
    variant(heads=50, rank=256, rope=0, dtype=torch.float16, **RAGGED),
]


@pytest.mark.parametrize("per", ["token", "block"])
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_many_rows_in_narrow_tiles(case: LatentCase, per: str) -> None:
    stored, said = stored_as(make_inputs(case, device="cuda"), per, 64)
    check(said, *turned(stored, tile_rows=32))


@pytest.mark.parametrize("case", [variant(heads=64, tokens=8192), variant(heads=40, tokens=9000, **RAGGED)], ids=str)
@pytest.mark.parametrize("apart", [False, True])
def test_weights_of_long_rows(case: LatentCase, apart: bool) -> None:
    """As FP8 values they cost more than in float16, and no more than is allowed."""
    stored, said = quantized(make_inputs(case, device="cuda"))
    stored = paged(stored, 64)
    check(said, *turned(stored, coarse_from=2**30, apart=apart), apart=apart)
    out, lse = turned(stored, apart=apart)
    check(said, out, lse, coarse=True, apart=apart)
    want = exact(said).out
    assert (out.double() - want).norm() / want.norm() > NORM, "as exact as float16"


@pytest.mark.parametrize(
    ("heads", "per", "apart"),
    [(16, "token", 0), (64, "token", 0), (16, "block", 0), (64, "block", 1), (64, "token", 1)],
)
def test_a_full_gpu_repeats_itself_to_the_bit(heads: int, per: str, apart: int) -> None:
    """Many calls of a row a program: what two partitions race for shows in few of them."""
    case = variant(batch=128, heads=heads, tokens=8192)
    stored, _ = stored_as(make_inputs(case, device="cuda"), per, 64)
    first = turned(stored, apart=apart)
    for _ in range(40):
        assert all(torch.equal(x, y) for x, y in zip(turned(stored, apart=apart), first, strict=True))


@pytest.mark.parametrize(("case", "page"), GROUPED, ids=lambda x: f"page{x}" if isinstance(x, int) else str(x))
def test_several_factors_a_token(case: LatentCase, page: int) -> None:
    """In wide tiles both parts of the queries at once, unasked."""
    stored, said = stored_as(make_inputs(case, device="cuda"), "block", page)
    out, lse = turned(stored)
    check(said, out, lse, apart=case.heads * case.queries > NARROW_ROWS)


@pytest.mark.parametrize("per", ["token", "block"])
@pytest.mark.parametrize(
    "case",
    [
        variant(heads=128, **RAGGED),
        variant(heads=40, queries=3, causal=True, **RAGGED),
        variant(batch=128, heads=64, tokens=2000),
        variant(batch=300, tokens=130, heads=130, **RAGGED),
        variant(heads=50, rank=256, rope=0, **RAGGED),
    ],
    ids=str,
)
def test_wide_tiles_in_float16(case: LatentCase, per: str) -> None:
    stored, said = stored_as(make_inputs(case, device="cuda"), per, 64)
    check(said, *turned(stored, coarse_from=2**30), apart=per == "block")


def test_factors_in_an_array_of_their_own() -> None:
    stored, said = quantized(make_inputs(variant(**RAGGED), device="cuda"), per="block", rounded=False)
    check(said, *turned(stored))


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)], ids=str)
def test_groups_of_every_size(order: tuple[int, ...], heads: int) -> None:
    """Groups of columns 1, 2^-10, 2^-20 and 2^-30 in size, and tokens that differ as well.

    P is in units of the largest factor of a block: 2^-20 of it float16 keeps, 2^-30 not in full precision. In wide
    tiles values are in units of 2^-7 times the largest factor of their token: of 2^-30 of it float16 keeps one bit.
    """
    inputs = make_inputs(variant(heads=heads, tokens=300), device="cuda")
    q_latent, q_pe, c_kv, *rest = inputs.tensors
    assert c_kv is not None
    sizes = torch.tensor([2.0 ** (-10 * k) for k in order], device="cuda").repeat_interleave(128)
    tokens = torch.tensor([2.0**k for k in range(-6, 1, 2)], device="cuda").repeat(75)[:, None]
    scaled = LatentInputs((q_latent, q_pe, (c_kv * sizes * tokens).to(c_kv.dtype), *rest), inputs.keywords)
    stored, said = stored_as(scaled, "block")
    out, lse = turned(stored)
    wide = heads > NARROW_ROWS
    want = exact(said, unit=2**-22, operand_unit=UNIT[out.dtype], key_unit=SUM_UNIT + IN_FLOAT16 * wide)
    assert not worst(lse, want.lse, want.lse_bound), f"lse: {worst(lse, want.lse, want.lse_bound)}"
    for k, got, exactly in zip(order, out.double().split(128, -1), want.out.split(128, -1), strict=True):
        bound = NORM if k < 3 else 0.5 if wide else 0.1
        assert (got - exactly).norm() / exactly.norm() <= bound, f"2^-{10 * k}"


@pytest.mark.parametrize("per", ["token", "block"])
def test_few_rows_are_multiplied_so_unasked(per: str) -> None:
    stored, _ = stored_as(make_inputs(variant(**RAGGED), device="cuda"), per, 64)
    for got, want in zip(mla_decode(*stored.tensors, **stored.keywords, impl="gluon"), turned(stored), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("heads", "per", "apart"),
    [(16, "token", 0), (64, "token", 0), (16, "block", 0), (64, "block", 1), (64, "token", 1)],
)
@pytest.mark.parametrize("exponent", [-30, 0, 12])
def test_queries_and_factors_of_every_size(exponent: int, heads: int, per: str, apart: int) -> None:
    """Rows of queries and factors of tokens far from 1, beyond the range of float16; a row of zeros."""
    inputs = make_inputs(variant(heads=heads, tokens=300, rope=0), device="cuda")
    q_latent, _, c_kv, *rest = inputs.tensors
    assert q_latent is not None
    assert c_kv is not None
    sizes = torch.tensor([2.0**k for k in range(-20, 1, 4)], device="cuda")
    q = q_latent * (sizes[torch.arange(heads) % len(sizes)] * 2.0**-exponent)[:, None, None]
    q[:, 3] = 0
    keys = c_kv * (sizes.repeat(50) * 2.0**exponent)[:, None]
    scaled = LatentInputs((q.to(q_latent.dtype), None, keys.to(c_kv.dtype), *rest), inputs.keywords)
    stored, said = stored_as(scaled, per)
    check(said, *turned(stored, apart=apart), apart=bool(apart))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("coarse_from", [0, 1000])
@pytest.mark.parametrize("slope", [-3.0, -0.4, 0.4, 3.0])
def test_scores_that_rise_or_fall_all_along(slope: float, coarse_from: int, apart: bool) -> None:
    """Up to 1300 powers of two between the first token and the last."""
    stored, said = quantized(sloped(make_inputs(variant(heads=64, tokens=300, rope=0), device="cuda"), slope))
    operand_unit = UNIT[torch.bfloat16] if coarse_from else COARSE_UNIT
    want = exact(said, unit=2**-22, operand_unit=operand_unit, key_unit=IN_FLOAT16 * apart)
    out, lse = turned(stored, coarse_from=coarse_from, apart=apart)
    bound = want.out_bound + least_of(out.dtype)
    if not coarse_from:
        bound = bound + least_of_e4m3(stored, said)
    assert not worst(out, want.out, bound), worst(out, want.out, bound)
    assert not worst(lse, want.lse, want.lse_bound), worst(lse, want.lse, want.lse_bound)


@pytest.mark.parametrize(
    ("heads", "per", "coarse_from", "tile_rows", "apart"),
    [
        (16, "token", 1 << 30, 64, 0),
        (64, "token", 1 << 30, 64, 0),
        (64, "token", 0, 64, 0),
        (128, "token", 0, 64, 0),
        (128, "token", 0, 32, 0),
        (16, "block", 0, 64, 0),
        (64, "block", 0, 64, 1),
        (64, "token", 1 << 30, 64, 1),
        (128, "token", 0, 64, 1),
    ],
)
def test_scores_far_apart(heads: int, per: str, coarse_from: int, tile_rows: int, apart: int) -> None:
    """What exponents count from moves for some rows in most blocks. A weight in e4m3 is off by 2^-4 of itself."""
    inputs = make_inputs(variant(heads=heads, tokens=5000, rope=0), device="cuda")
    q_latent = inputs.tensors[0]
    assert q_latent is not None
    q_latent.mul_(4)
    stored, said = stored_as(inputs, per)
    out, lse = turned(stored, tile_rows, coarse_from=coarse_from, apart=apart)
    coarse = heads > NARROW_ROWS and tile_rows == 64 and not coarse_from and per == "token"
    operand_unit = COARSE_UNIT if coarse else UNIT[out.dtype]
    want = exact(said, unit=2**-22, operand_unit=operand_unit, key_unit=SUM_UNIT + IN_FLOAT16 * apart)
    bound = want.out_bound + (least_of_e4m3(stored, said) if coarse else 0.0)
    assert not worst(out, want.out, bound), worst(out, want.out, bound)
    assert not worst(lse, want.lse, want.lse_bound), worst(lse, want.lse, want.lse_bound)
    assert (out.double() - want.out).norm() / want.out.norm() < (COARSE_UNIT if coarse else (4 if apart else 2) * NORM)


@pytest.mark.parametrize(
    ("heads", "per", "coarse_from", "apart"),
    [
        *((heads, per, 1000, 0) for heads in (16, 64) for per in ("token", "block")),
        (64, "token", 0, 0),
        (64, "token", 0, 1),
        (64, "token", 1000, 1),
    ],
)
def test_queries_that_are_not_finite_make_their_rows_nan(heads: int, per: str, coarse_from: int, apart: int) -> None:
    stored, _ = stored_as(make_inputs(variant(heads=heads, tokens=200), device="cuda"), per, 64)
    q_latent, q_pe = stored.tensors[:2]
    assert q_latent is not None
    assert q_pe is not None
    q_latent[0, 5, 0, 77], q_latent[1, heads - 4, 0, 3], q_pe[2, 9, 0, 1] = math.inf, math.nan, -math.inf
    out, lse = turned(stored, coarse_from=coarse_from, apart=apart)
    wrong = torch.zeros(3, heads, dtype=torch.bool, device="cuda")
    wrong[0, 5] = wrong[1, heads - 4] = wrong[2, 9] = True
    assert torch.equal(out.isnan().all(-1)[:, :, 0], wrong)
    assert torch.equal(out.isnan().any(-1)[:, :, 0], wrong)
    assert torch.equal(lse.isnan()[:, :, 0], wrong)


@pytest.mark.parametrize(
    ("heads", "per", "coarse_from", "apart"),
    [
        *((heads, per, 1000, 0) for heads in (16, 64) for per in ("token", "block")),
        (64, "token", 0, 0),
        (64, "token", 0, 1),
        (64, "token", 1000, 1),
    ],
)
def test_nan_in_a_live_row_reaches_the_output(heads: int, per: str, coarse_from: int, apart: int) -> None:
    stored, _ = stored_as(make_inputs(variant(heads=heads, tokens=200), device="cuda"), per)
    c_kv, descale = stored.tensors[2], stored.tensors[8]
    assert c_kv is not None
    assert descale is not None
    c_kv.view(torch.uint8)[0, 130, 77] = 0x7F
    descale[1, 3] = math.nan
    out, lse = turned(stored, coarse_from=coarse_from, apart=apart)
    assert out[:2].isnan().all()
    assert lse[:2].isnan().all()
    assert not out[2].isnan().any()
