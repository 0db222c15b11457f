"""The Hopper kernel for a weight of each head on a GPU against float64: rows in 16 bits, rows in FP8, what is spent."""

from __future__ import annotations

import pytest
import torch

from mlacompile.kernels.fp8_linear.supports import heads_reasons
from mlacompile.ops.fp8_linear import fp8_linear
from mlacompile.ops.heads_quantized import heads_quantized, heads_quantized_reference
from mlacompile.testing.heads import make_heads, worst_quantized
from mlacompile.testing.scaled import E4M3, KINDS, Product, exact, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
DTYPES = [torch.bfloat16, torch.float16]
#: (m, heads, n, k): up and down as DeepSeek-V3 does, few rows and heads, K and N in whole blocks and not.
SHAPES = [
    (64, 128, 512, 128),
    (64, 128, 128, 512),
    (17, 20, 256, 64),
    (33, 5, 128, 96),
    (40, 140, 128, 512),
    (50, 3, 208, 144),
    (1, 1, 8, 16),
]
QUANTIZED = [shape for shape in SHAPES if shape[2] == 128]


def quantized(product: Product, *, spent: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return heads_quantized(product.x, product.weight, product.weight_descale, spent=spent, impl="heads")  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "heads", "n", "k"), SHAPES)
def test_parity(m: int, heads: int, n: int, k: int, dtype: torch.dtype, kind: str) -> None:
    product = make_heads(m, heads, n, k, kind=kind, dtype=dtype, device="cuda")
    assert not heads_reasons(*product.tensors, dtype)
    got = fp8_linear(*product.tensors, dtype, impl="heads")
    assert got.is_contiguous()
    assert got.dtype == dtype
    want, bound = exact(product, dtype)
    if dtype == torch.float16:  # what it cannot hold becomes infinite
        bound = torch.where(want.abs() > 6e4, torch.inf, bound)
    assert not worst(got.where(bound.isfinite(), 0), want.where(bound.isfinite(), 0), bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "heads", "n", "k"), QUANTIZED)
def test_parity_quantized(m: int, heads: int, n: int, k: int, dtype: torch.dtype) -> None:
    for kind in KINDS:
        if kind == "outliers" and dtype == torch.float16:  # which cannot hold their products
            continue
        product = make_heads(m, heads, n, k, kind=kind, dtype=dtype, device="cuda")
        assert not (wrong := worst_quantized(product, quantized(product))), (kind, wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_differs_from_the_reference_in_few_values(dtype: torch.dtype) -> None:
    """A result in 16 bits between two may go to either, and takes a value of FP8, or a scale, along."""
    product = make_heads(64, 128, 128, 512, dtype=dtype, device="cuda")
    q, descale = quantized(product)
    want, want_descale = heads_quantized_reference(product.x, product.weight, product.weight_descale)
    assert ((descale - want_descale).abs() <= want_descale * torch.finfo(dtype).eps).all()
    assert (q.view(torch.uint8) != want.view(torch.uint8)).float().mean() < 0.02


def test_nothing_beyond_the_results_is_written() -> None:
    from mlacompile.kernels.fp8_linear.heads_launch import heads_launch

    m, heads = 17, 6
    for n, k in ((208, 144), (128, 512)):
        product = make_heads(m, heads, n, k, device="cuda")
        x, _, weight, descale = product.tensors
        room = torch.full((heads + 2, m, n), torch.nan, dtype=x.dtype, device="cuda")
        heads_launch(x, weight, descale, room[1:-1])()
        assert not worst(room[1:-1], *exact(product, x.dtype))
        assert room[[0, -1]].isnan().all()
    room_q = torch.full((m + 64, heads * 128), 0x55, dtype=torch.uint8, device="cuda")
    room_descale = torch.full((m + 64, heads), 0.5, device="cuda")
    results = room_q.view(E4M3)[:m], room_descale[:m]
    heads_launch(x, weight, descale, results)()
    assert not worst_quantized(product, results)
    assert (room_q[m:] == 0x55).all()
    assert (room_descale[m:] == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_where_it_is(dtype: torch.dtype) -> None:
    product = make_heads(40, 5, 128, 512, dtype=dtype, device="cuda")
    product.x[1, 3, 7], product.x[2, 39, 511], product.x[4, 0, 130] = torch.nan, -torch.inf, torch.inf
    product.x[0, 5] = 0
    product.weight.view(torch.uint8)[3, 100, 300] = 0x7F  # NaN in e4m3
    q, descale = quantized(product)
    _, want = heads_quantized_reference(product.x, product.weight, product.weight_descale)
    assert torch.equal(descale.isnan(), want.isnan())
    bad = descale.isnan()
    assert bad[:, 3].all()
    bad[:, 3] = False
    assert bad.nonzero().tolist() == [[0, 4], [3, 1], [39, 2]]
    assert descale[5, 0] == 1
    assert (q.view(torch.uint8)[5, :128] & 0x7F == 0).all()
    rows = fp8_linear(*product.tensors, dtype, impl="heads").isfinite()
    assert not rows[3, :, 100].any()
    assert rows[3, :, :100].all()
    assert not rows[1, 3].any()
    assert rows[1, :3].all()
    assert rows[0].all()


def test_what_is_spent_is_lost_and_nothing_else() -> None:
    """What was dropped is not in memory: there is what was written there before, unless L2 had been written out."""
    product = make_heads(64, 32, 128, 512, device="cuda")
    want = quantized(product)
    whole = product.x._base
    assert whole is not None
    values = whole.clone()
    through_l2 = torch.ones(128 << 20, device="cuda")  # several times its size
    lost = 0.0
    for _ in range(10):  # other processes may come between
        whole.fill_(1.0)
        through_l2.add_(1)
        whole.copy_(values)
        got = quantized(product, spent=True)
        through_l2.add_(1)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        lost = max(lost, float((product.x == 1.0).float().mean()))
        product.x.fill_(2.0)
        assert ((whole == values) | (whole.isnan() & values.isnan()) | (whole == 2.0)).all(), "lost, and not spent"
    assert lost > 0.5, f"of x {lost} was not written to memory"
    odd = make_heads(20, 5, 128, 96, device="cuda")
    for one, other in zip(quantized(odd, spent=True), quantized(odd), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_it_is_the_one_that_is_chosen() -> None:
    product = make_heads(64, 128, 128, 512, device="cuda")
    got = heads_quantized(product.x, product.weight, product.weight_descale)
    for one, other in zip(got, quantized(product), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    got = fp8_linear(*product.tensors, torch.bfloat16)
    assert torch.equal(got, fp8_linear(*product.tensors, torch.bfloat16, impl="heads"))


def test_replays_from_a_graph() -> None:
    """One call behind the other, each launched while the one before ends: none reads what is not there yet."""
    up, down = (make_heads(64, 128, n, k, device="cuda") for n, k in ((512, 128), (128, 512)))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        latents = fp8_linear(*up.tensors, torch.bfloat16, impl="heads")
        return heads_quantized(latents, down.weight, down.weight_descale, spent=True, impl="heads")  # type: ignore[no-any-return]

    want = both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [both() for _ in range(5)]
    for _ in range(50):
        for q, descale in outs:
            q.view(torch.uint8).fill_(0x7F), descale.fill_(torch.nan)
        graph.replay()
        for got in outs:
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))
