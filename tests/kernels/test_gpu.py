"""The kernels on a GPU against float64: dtypes, odd heads, ragged and poisoned caches, masks, tails, CUDA graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mlacompile.kernels import registry
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
#: Of an FP8 cache with several factors a token the Hopper kernel rounds a factor and a product with it to float16. In
#: bfloat16 that is nothing beside P and the output; in float16 keys and values are twice as inexact as P.
KEY_UNIT = 2**-10
NORM_KEYS = {torch.bfloat16: 3e-3, torch.float16: 6e-4}

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


def check(inputs: LatentInputs, out: torch.Tensor, lse: torch.Tensor, *, key_unit: float = 0.0) -> None:
    dtype = out.dtype
    want = exact(inputs, unit=2**-22, operand_unit=UNIT[dtype], key_unit=key_unit)
    assert not worst(out, want.out, want.out_bound), f"out: {worst(out, want.out, want.out_bound)}"
    assert not worst(lse, want.lse, want.lse_bound), f"lse: {worst(lse, want.lse, want.lse_bound)}"
    if want.out.norm() > 0:
        assert (out.double() - want.out).norm() / want.out.norm() <= (NORM_KEYS if key_unit else NORM)[dtype]


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
    (variant(heads=16, rank=256, rope=0, **RAGGED), {"per": "token"}, 32),
    (variant(heads=128, **RAGGED), {"per": "block"}, 32),
]  # fmt: skip


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper kernel widens every FP8 cache: ``test_gpu_fp8_products.py`` is about products in FP8."""
    pytest.importorskip("triton", reason="tiles are described to Triton")
    from mlacompile.kernels.mla_decode import hopper_launch

    monkeypatch.setattr(hopper_launch, "turned_reasons", lambda c_kv: ["the test asks for the other"])


def reproduces(inputs: LatentInputs, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = mla_decode(*inputs.tensors, **inputs.keywords, impl=impl)
    for _ in range(3):
        again, lse_again = mla_decode(*inputs.tensors, **inputs.keywords, impl=impl)
        assert torch.equal(out, again), "a result that changes between runs is a race"
        assert torch.equal(lse, lse_again)
    return out, lse


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


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("case", "fp8", "page"), FP8_CASES, ids=str)
def test_parity_on_fp8(case: LatentCase, fp8: dict[str, Any], page: int, impl: str) -> None:
    """The portable kernel rounds values times several factors to 16 bits, as the reference does; the other does not."""
    several, ours = fp8["per"] == "block", impl == "gluon"
    stored, said = quantized(make_inputs(case, device="cuda"), **fp8, rounded=not ours)
    stored = paged(stored, page) if page else stored
    ran = 0
    for inputs in [stored, in_one_run(stored)] if several else [stored]:
        reasons = registry.find("mla_decode", impl).supports(*inputs.tensors, **inputs.keywords)
        if reasons:  # factors in an array of their own, other than one or four a token
            assert ours and "descale has tokens" in reasons[0]  # noqa: PT018
            best, passed = registry.best("mla_decode", *inputs.tensors, **inputs.keywords)
            assert best is not None and best.name == "triton" and passed["gluon"] == reasons  # noqa: PT018
            continue
        check(said, *reproduces(inputs, impl), key_unit=KEY_UNIT if several and ours else 0.0)
        ran += 1
    assert ran


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


@hopper
@pytest.mark.parametrize("heads", [16, 128])
def test_one_batch_row_of_any_length(heads: int) -> None:
    """Its partials are sent for before it is known how many were written: the others may hold anything."""
    inputs = make_inputs(variant(batch=1, tokens=20_000, heads=heads), device="cuda")
    for live in (0, 1, 64, 65, 130, 700, 5000, 19_999):
        anything = torch.full((1 << 26,), math.nan, device="cuda")
        del anything  # what the partials are written to next
        length = torch.tensor([live], dtype=torch.int32, device="cuda")
        inputs.tensors = (*inputs.tensors[:6], length)
        check(inputs, *mla_decode(*inputs.tensors, **inputs.keywords, impl="gluon"))


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


@hopper
@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("per", ["token", "block"])
def test_factors_and_queries_of_any_size(per: str) -> None:
    """Tiles and P are in float16, whose range is narrow.

    Factors differ by 10^5 from token to token and from block to block, those of a token by 10^3; queries are small or
    large.
    """
    plain = make_inputs(variant(batch=2, heads=20, tokens=500), device="cuda")
    q_latent, q_pe, c_kv, k_pe, *rest = plain.tensors
    assert q_latent is not None and q_pe is not None and c_kv is not None and k_pe is not None  # noqa: PT018
    gen = torch.Generator().manual_seed(3)
    size = 10 ** (5 * torch.rand(2, 500, 1, generator=gen) - 4)
    size[:, 128:192] *= 1e-3
    groups = 10 ** (3 * torch.rand(2, 500, 4, generator=gen) - 3).repeat_interleave(128, -1)
    c_kv = (c_kv * (size * groups).to(c_kv)).to(c_kv.dtype)
    for shrink in (1e-2, 1.0, 1e3):
        inputs = LatentInputs((q_latent * shrink, q_pe * min(shrink, 1.0), c_kv, k_pe, *rest), dict(plain.keywords))
        stored, said = quantized(inputs, per=per, rounded=False)
        stored = in_one_run(stored) if per == "block" else stored
        check(said, *reproduces(stored, "gluon"), key_unit=KEY_UNIT if per == "block" else 0.0)
