"""The kernels on a GPU against float64: dtypes, odd heads, ragged and poisoned caches, masks, tails, CUDA graphs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mlacompile.kernels import registry
from mlacompile.kernels.mla_decode.supports import in_place_reasons, turned_reasons
from mlacompile.ops import mla_decode
from mlacompile.testing.latents import LatentCase, LatentInputs, exact, in_one_run, make_inputs, paged, quantized, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Unit roundoff of the dtype in which P enters the second product and in which the output is stored.
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}
#: What DeepSeek's kernels and ours reach on random bf16 inputs, as a bound on the norm of the error.
NORM = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}
#: The same where cached values times their factors are rounded before they are multiplied: independent errors of
#: 2^-9 / sqrt(3) of each key and each value, beside those of P, of partials and of the output.
NORM_ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 6e-4}

#: A sum of FP8 products drops what lies 2^13 below its largest addend: 33 addends a step, 32 steps, errors of either
#: sign, 2^-13 * sqrt(33 * 32 / 3) of a sum that is a twentieth of its addends' sizes, and five times that at worst.
FP8_SUM = 2**-10
#: What is asked of products in FP8.
NORM_FP8 = 2e-2

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
IMPLS = ["triton", pytest.param("gluon", marks=hopper)]

DEEPSEEK = LatentCase(batch=3, heads=16, tokens=1000, rank=512, rope=64, dtype=torch.bfloat16)


def variant(**changes: object) -> LatentCase:
    return LatentCase(**{**DEEPSEEK.__dict__, **changes})  # type: ignore[arg-type]


RAGGED = {"start": True, "length": True, "poison": True}
CASES = [
    DEEPSEEK,
    *(variant(heads=heads, fused=True, **RAGGED) for heads in (1, 3, 20, 40, 64, 128)),
    *(variant(queries=queries, causal=True, length=True, poison=True) for queries in (2, 3, 4, 8)),
    *(variant(heads=128, queries=queries, causal=True, **RAGGED) for queries in (2, 5)),
    *(variant(dtype=dtype, **RAGGED) for dtype in (torch.float16, torch.float32)),
    *(variant(dtype=dtype, heads=128, fused=True) for dtype in (torch.float16, torch.float32)),
    *(variant(tokens=tokens, length=True, poison=True) for tokens in (1, 17, 63, 64, 65, 128)),
    *(
        variant(rank=rank, rope=rope, **RAGGED)
        for rank, rope in ((256, 32), (320, 64), (96, 0), (40, 8), (20, 10), (512, 0))
    ),
    *(variant(mask=mask, poison=True) for mask in ("bool", "additive", "shared")),
    *(variant(mask=mask, heads=128, queries=2, **RAGGED) for mask in ("bool", "additive")),
    *(variant(mask="bool", heads=16, queries=4, dtype=dtype, **RAGGED) for dtype in (torch.float16, torch.float32)),
    variant(batch=1, tokens=20_000, heads=16, length=True),
    variant(batch=140, tokens=300, heads=8, **RAGGED),
]


def check(
    inputs: LatentInputs, out: torch.Tensor, lse: torch.Tensor, *, rounded: bool = False, fp8_products: bool = False
) -> None:
    dtype = out.dtype
    key_unit = FP8_SUM if fp8_products else UNIT[dtype] if rounded else 0.0
    want = exact(inputs, unit=2**-22, operand_unit=max(UNIT[dtype], fp8_products * 2**-11), key_unit=key_unit)
    assert not worst(out, want.out, want.out_bound), f"out: {worst(out, want.out, want.out_bound)}"
    assert not worst(lse, want.lse, want.lse_bound), f"lse: {worst(lse, want.lse, want.lse_bound)}"
    if want.out.norm() > 0:
        assert (out.double() - want.out).norm() / want.out.norm() <= (
            NORM_FP8 if fp8_products else (NORM_ROUNDED if rounded else NORM)[dtype]
        )


#: What the Hopper kernel takes of these: 16 bits, no mask, tokens 16 bytes apart.
HOPPER_CASES = [
    case for case in CASES if case.dtype != torch.float32 and case.mask is None and case.rank % 8 == case.rope % 8 == 0
] + [
    *(variant(heads=h, queries=s, causal=True, **RAGGED) for h, s in ((1, 8), (7, 8), (16, 4), (40, 2))),
    variant(rank=128, rope=64, fused=True, **RAGGED),
    variant(rank=384, rope=32, heads=128, dtype=torch.float16, **RAGGED),
    variant(batch=300, tokens=130, heads=130, **RAGGED),
    variant(batch=5, tokens=9000, heads=64, **RAGGED),
]  # fmt: skip
PAGED_CASES = [
    *((variant(fused=True, heads=128, **RAGGED), page) for page in (16, 32, 64, 256)),
    *((variant(queries=4, causal=True, heads=16, **RAGGED), page) for page in (16, 64)),
    (variant(batch=1, tokens=20_000, heads=16), 64),
    (variant(batch=9, tokens=70, heads=20, rank=256, rope=32, **RAGGED), 128),
    (variant(batch=40, tokens=3000, heads=128, rope=0, **RAGGED), 64),
]


FP8_CASES = [
    (variant(heads=heads, **RAGGED), fp8, page)
    for heads, fp8, page in (
        (128, {"per": "token"}, 0),
        (16, {"per": "token"}, 64),
        (40, {"per": "block"}, 0),
        (128, {"per": "block"}, 64),
        (16, {"per": "token", "dtype": torch.float8_e5m2}, 128),
        (20, {"per": "block", "dtype": torch.float8_e5m2}, 0),
    )
] + [
    (variant(heads=16, queries=4, causal=True, length=True, poison=True), {"per": "token"}, 64),
    (variant(heads=64, rank=256, rope=32, **RAGGED), {"per": "block"}, 64),
    (variant(heads=64, rank=384, rope=0, dtype=torch.float16, **RAGGED), {"per": "token"}, 0),
    (variant(batch=1, tokens=20_000, heads=128), {"per": "token"}, 64),
    (variant(batch=70, tokens=700, heads=128, **RAGGED), {"per": "block"}, 0),
    (variant(heads=20, rank=320, rope=64, dtype=torch.float16, **RAGGED), {"per": "block"}, 64),
    (variant(heads=7, rank=128, rope=64, **RAGGED), {"per": "token", "dtype": torch.float8_e5m2}, 0),
    (variant(batch=300, tokens=130, heads=130, **RAGGED), {"per": "token"}, 256),
    *((variant(heads=16, tokens=tokens, length=True, poison=True), {"per": "block"}, 0) for tokens in (1, 63, 65)),
]  # fmt: skip


FP8_SMALL_PAGES = [
    (variant(heads=16, rank=256, rope=0, **RAGGED), {"per": "token"}, 32),
    (variant(heads=128, **RAGGED), {"per": "block"}, 32),
]


def reproduces(inputs: LatentInputs, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = mla_decode(*inputs.tensors, **inputs.keywords, impl=impl)
    for _ in range(3):
        again, lse_again = mla_decode(*inputs.tensors, **inputs.keywords, impl=impl)
        assert torch.equal(out, again), "a result that changes between runs is a race"
        assert torch.equal(lse, lse_again)
    return out, lse


def cache_of(inputs: LatentInputs) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    c_kv, k_pe, (table, descale) = inputs.tensors[2], inputs.tensors[3], inputs.tensors[7:9]
    assert c_kv is not None and descale is not None  # noqa: PT018
    return c_kv, k_pe, table, descale


def planned(inputs: LatentInputs, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hopper kernel that a changed plan names, three times over."""
    from mlacompile.kernels.mla_decode.hopper_launch import hopper_launches, hopper_shape
    from mlacompile.kernels.mla_decode.launch import device_of
    from mlacompile.kernels.mla_decode.plan import hopper_plan

    q_latent, q_pe, c_kv, k_pe, _, start, length, table, descale = inputs.tensors
    assert q_latent is not None
    tensors = (q_latent, q_pe, c_kv, k_pe, start, length, table, descale)
    plan = replace(hopper_plan(hopper_shape(tensors), device_of(q_latent.device)), **changes)
    results = []
    for _ in range(3):
        out = q_latent.new_full(q_latent.shape, math.nan)  # contiguous, whatever the queries are
        lse = q_latent.new_full(q_latent.shape[:3], math.nan, dtype=torch.float32)
        for launch in hopper_launches(tensors, out, lse, plan, **inputs.keywords):
            launch.run()
        results.append((out, lse))
    first = results[0][0]
    assert all(torch.equal(out.nan_to_num(7), first.nan_to_num(7)) for out, _ in results), "results change: a race"
    return results[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: LatentCase) -> None:
    inputs = make_inputs(case, device="cuda")
    check(inputs, *reproduces(inputs, "triton"))


@hopper
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_parity(case: LatentCase) -> None:
    inputs = make_inputs(case, device="cuda")
    check(inputs, *reproduces(inputs, "gluon"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("case", "page"), PAGED_CASES, ids=lambda x: f"page{x}" if isinstance(x, int) else str(x))
def test_parity_on_pages(case: LatentCase, page: int, impl: str) -> None:
    inputs = make_inputs(case, device="cuda")
    check(inputs, *reproduces(paged(inputs, page), impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("case", "fp8", "page"), FP8_CASES, ids=str)
def test_parity_on_fp8(case: LatentCase, fp8: dict[str, Any], page: int, impl: str) -> None:
    stored, said = quantized(make_inputs(case, device="cuda"), **fp8)
    stored = paged(stored, page) if page else stored
    # With a factor for 128 values both sides round to 16 bits; with one a token only the Hopper kernel does.
    check(said, *reproduces(stored, impl), rounded=impl == "gluon" and fp8["per"] == "token")
    if fp8["per"] == "block":
        check(said, *reproduces(in_one_run(stored), impl))


@hopper
@pytest.mark.parametrize(("case", "fp8", "page"), [*FP8_CASES, *FP8_SMALL_PAGES], ids=str)
def test_parity_of_widening_in_place(case: LatentCase, fp8: dict[str, Any], page: int) -> None:
    """The kernel that nothing chooses before this test has passed on a GPU."""
    stored, said = quantized(make_inputs(case, device="cuda"), **fp8)
    stored = paged(stored, page) if page else stored
    for inputs in [stored] + [in_one_run(stored)] * (fp8["per"] == "block"):
        assert not in_place_reasons(*cache_of(inputs))
        check(said, *planned(inputs, in_place=True))


#: With one factor a token, e4m3: all numbers of columns of the turned output, ragged and poisoned.
TURNED_CASES = [
    (case, fp8, page)
    for case, fp8, page in [*FP8_CASES, *FP8_SMALL_PAGES]
    if fp8["per"] == "token" and "dtype" not in fp8
] + [
    *((variant(heads=heads, **RAGGED), {"per": "token"}, 64) for heads in (1, 3, 20, 40, 64, 130)),
    *((variant(heads=128, queries=queries, causal=True, **RAGGED), {"per": "token"}, 64) for queries in (2, 5)),
    *((variant(heads=16, tokens=tokens, length=True, poison=True), {"per": "token"}, 64) for tokens in (1, 63, 65)),
    (variant(batch=1, heads=16, tokens=67), {"per": "token"}, 0),
    (variant(heads=7, rank=128, rope=64, **RAGGED), {"per": "token"}, 0),
    (variant(heads=16, queries=8, rank=256, rope=32, causal=True, **RAGGED), {"per": "token"}, 128),
    (variant(heads=128, dtype=torch.float16, **RAGGED), {"per": "token"}, 64),
]  # fmt: skip


@hopper
@pytest.mark.parametrize(("case", "fp8", "page"), TURNED_CASES, ids=str)
def test_parity_of_fp8_products(case: LatentCase, fp8: dict[str, Any], page: int) -> None:
    stored, said = quantized(make_inputs(case, device="cuda"), **fp8)
    stored = paged(stored, page) if page else stored
    assert not turned_reasons(*cache_of(stored))
    check(said, *planned(stored, turned=True), fp8_products=True)


@hopper
def test_fp8_products_of_queries_and_factors_of_every_size() -> None:
    """Rows of queries and factors of tokens far from 1, beyond the range of float16; a row of zeros."""
    inputs = make_inputs(variant(heads=64, tokens=300, rope=0), device="cuda")
    q_latent, _, c_kv, *rest = inputs.tensors
    assert q_latent is not None and c_kv is not None  # noqa: PT018
    sizes = torch.tensor([2.0**k for k in range(-20, 1, 4)], device="cuda", dtype=q_latent.dtype)
    up = sizes[torch.arange(64, device="cuda") % len(sizes)]
    for exponent in (-30, 0, 12):  # of the whole cache, against which the queries are scaled back
        size = torch.full((300, 1), 2.0**exponent, device="cuda") * sizes[:, None].repeat(50, 1)
        q = (q_latent * (up * 2.0**-exponent)[:, None, None]).to(q_latent.dtype)
        q[:, 3] = 0
        scaled = LatentInputs((q, None, (c_kv * size).to(c_kv.dtype), *rest), inputs.keywords)
        stored, said = quantized(scaled)
        check(said, *planned(stored, turned=True), fp8_products=True)


@hopper
def test_queries_that_are_not_finite_make_their_rows_nan() -> None:
    stored, _ = quantized(make_inputs(variant(heads=64, tokens=200), device="cuda"))
    q_latent, q_pe = stored.tensors[:2]
    assert q_latent is not None and q_pe is not None  # noqa: PT018
    q_latent[0, 5, 0, 77], q_latent[1, 60, 0, 3], q_pe[2, 9, 0, 1] = math.inf, math.nan, -math.inf
    out, lse = planned(stored, turned=True)
    wrong = torch.zeros(3, 64, dtype=torch.bool, device="cuda")
    wrong[0, 5] = wrong[1, 60] = wrong[2, 9] = True
    assert torch.equal(out.isnan().all(-1)[:, :, 0], wrong)
    assert torch.equal(out.isnan().any(-1)[:, :, 0], wrong)
    assert torch.equal(lse.isnan()[:, :, 0], wrong)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_in_a_live_fp8_row_reaches_the_output(dtype: torch.dtype, impl: str) -> None:
    """Whether the factor is NaN, as our quantizer says it, or a value, as others do."""
    stored, _ = quantized(make_inputs(variant(batch=3, tokens=200), device="cuda"), dtype=dtype)
    c_kv, descale = stored.tensors[2], stored.tensors[8]
    assert c_kv is not None and descale is not None  # noqa: PT018
    c_kv.view(torch.uint8)[0, 130, 77] = 0x7F
    descale[1, 3] = math.nan
    out, lse = mla_decode(*stored.tensors, **stored.keywords, impl=impl)
    assert out[:2].isnan().all()
    assert lse[:2].isnan().all()
    assert not out[2].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_wild_page_numbers_of_live_tokens_read_the_nearest_page(impl: str) -> None:
    inputs = paged(make_inputs(variant(batch=2, tokens=256), device="cuda"), 64, shuffled=False)
    table = inputs.tensors[7]
    assert table is not None
    table[0, 1], table[1, 0] = 2**31 - 1, -5
    out, lse = mla_decode(*inputs.tensors, **inputs.keywords, impl=impl)
    want, want_lse = mla_decode(*inputs.tensors, **inputs.keywords, impl="reference")
    torch.cuda.synchronize()
    # Page 15, the last, is one of NaN; page 0 is not.
    assert out[0].isnan().all()
    assert want[0].isnan().all()
    torch.testing.assert_close(out[1], want[1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse[1], want_lse[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_outside_the_cache_are_cut(impl: str) -> None:
    inputs = make_inputs(variant(batch=4, tokens=200, heads=20), device="cuda")
    length = torch.tensor([-3, 0, 201, 2**31 - 1], dtype=torch.int32, device="cuda")
    start = torch.tensor([-7, 5, 199, 2**31 - 1], dtype=torch.int32, device="cuda")
    inputs.tensors = (*inputs.tensors[:5], start, length)
    check(inputs, *reproduces(inputs, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_static_cache_longer_than_its_rows(impl: str) -> None:
    """A slice of a larger cache: batch rows lie further apart than T tokens."""
    inputs = make_inputs(variant(tokens=500, fused=True), device="cuda")
    q, q_pe, c_kv, k_pe, *rest = inputs.tensors
    inputs.tensors = (q, q_pe, c_kv[:, :300], k_pe[:, :300], *rest)  # type: ignore[index]
    check(inputs, *mla_decode(*inputs.tensors, **inputs.keywords, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_replays_from_a_graph_with_new_lengths(impl: str) -> None:
    """Bounds are read on the device: a captured launch follows them, however short or long a row becomes."""
    inputs = make_inputs(variant(batch=4, heads=16, length=True), device="cuda")
    length = inputs.tensors[6]
    assert length is not None

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return mla_decode(*inputs.tensors, **inputs.keywords, impl=impl)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for lengths in ([1000, 1, 64, 513], [0, 63, 65, 1000], [7, 7, 7, 7]):
        length.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        check(inputs, out, lse)


@pytest.mark.parametrize("impl", IMPLS)
def test_cache_beyond_two_to_the_31_elements(impl: str) -> None:
    """Offsets of batch rows are 64-bit; only the last rows are compared."""
    b, t, r, p = 64, 65_536, 512, 64
    if torch.cuda.mem_get_info()[0] < 2.5 * b * t * (r + p):
        pytest.skip("needs 6 GB of free GPU memory")
    cache = torch.empty(b, t, r + p, dtype=torch.bfloat16, device="cuda")
    cache[-1].normal_()
    q, q_pe = (
        torch.randn(b, 16, 1, r, device="cuda").bfloat16(),
        torch.randn(b, 16, 1, p, device="cuda").bfloat16(),
    )
    length = torch.zeros(b, dtype=torch.int32, device="cuda")
    length[-1] = t
    scale = (r + p) ** -0.5
    out, lse = mla_decode(q, q_pe, cache[..., :r], cache[..., r:], None, None, length, scale=scale, impl=impl)
    last = LatentInputs((q[-1:], q_pe[-1:], cache[-1:, :, :r], cache[-1:, :, r:], None, None, None), {"scale": scale})
    check(last, out[-1:], lse[-1:])
    assert torch.equal(out[:-1], torch.zeros_like(out[:-1]))
    assert (lse[:-1] == -math.inf).all()


def test_auto_takes_the_kernel() -> None:
    inputs = make_inputs(DEEPSEEK, device="cuda")
    best, _ = registry.best("mla_decode", *inputs.tensors, **inputs.keywords)
    assert best is not None
    forced = mla_decode(*inputs.tensors, **inputs.keywords, impl=best.name)[0]
    assert torch.equal(mla_decode(*inputs.tensors, **inputs.keywords)[0], forced)
