"""The Hopper kernel of ``fp8_linear`` for few rows on a GPU against float64: edges, strips, parts, roots, graphs."""

from __future__ import annotations

import pytest
import torch

from mlacompile.kernels.fp8_linear.stream_tiles import MOST_PARTS
from mlacompile.kernels.fp8_linear.supports import stream_reasons
from mlacompile.ops.fp8_linear import fp8_linear
from mlacompile.ops.fp8_linear_parts import fp8_linear_parts
from mlacompile.ops.fp8_normed import fp8_normed
from mlacompile.ops.fp8_stacked import fp8_stacked
from mlacompile.testing.normed import make_normed, worst_normed
from mlacompile.testing.scaled import KINDS, Product, exact, make_product, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
#: block_m, blocks, strip, parts, as in ``StreamTiles``.
TILES = [(64, 1, 0, 1), (64, 1, 64, 2), (64, 2, 32, 1), (64, 2, 0, 3), (128, 1, 16, 1), (128, 1, 64, 2)]
#: (m, n, k): rows and columns beyond a tile and short of it, fewer tiles than SMs and more, K of one block and of many.
SHAPES = [(1, 8, 16), (17, 200, 144), (64, 2112, 7168), (50, 576, 1552), (64, 20000, 784), (33, 128, 8192)]


def run(product: Product, dtype: torch.dtype, tiles: tuple[int, int, int, int]) -> torch.Tensor:
    from mlacompile.kernels.fp8_linear.stream_launch import fp8_linear_stream
    from mlacompile.kernels.fp8_linear.stream_tiles import StreamTiles

    assert not stream_reasons(*product.tensors, dtype)
    assert product.x_descale is not None
    return fp8_linear_stream(
        product.x, product.x_descale, product.weight, product.weight_descale, dtype, StreamTiles(*tiles)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_parity(m: int, n: int, k: int, kind: str) -> None:
    for tiles in TILES:
        product = make_product(m * tiles[0] // 64, n, k, quantized=True, kind=kind, device="cuda")
        for dtype in (torch.bfloat16, torch.float16):
            want, bound = exact(product, dtype)
            if dtype == torch.float16:  # what it cannot hold becomes infinite
                bound = torch.where(want.abs() > 6e4, torch.inf, bound)
            got = run(product, dtype, tiles)
            assert got.is_contiguous()
            assert got.dtype == dtype
            wrong = worst(got.where(bound.isfinite(), 0), want.where(bound.isfinite(), 0), bound)
            assert not wrong, f"{tiles}: {wrong}"


@pytest.mark.parametrize("tiles", TILES)
def test_strided_inputs(tiles: tuple[int, int, int, int]) -> None:
    product = make_product(60, 1256, 512, quantized=True, device="cuda")
    assert product.x_descale is not None
    want = run(product, torch.bfloat16, tiles)
    wide = torch.zeros(60, 768, dtype=torch.uint8, device="cuda")
    wide[:, 128:640] = product.x.view(torch.uint8)
    x = wide.view(product.x.dtype)[:, 128:640]
    weight = torch.cat([product.weight.view(torch.uint8)] * 2, 1).view(product.weight.dtype)[:, 512:]
    turned = product.x_descale.t().contiguous().t()
    assert turned.stride() == (1, 60)
    got = run(Product(x, turned, weight, product.weight_descale), torch.bfloat16, tiles)
    assert torch.equal(got, want)


@pytest.mark.parametrize("tiles", TILES)
def test_blocks_that_are_not_finite_stay_where_they_are(tiles: tuple[int, int, int, int]) -> None:
    product = make_product(60, 384, 1024, quantized=True, device="cuda")
    assert product.x_descale is not None
    product.weight_descale[1, 3] = torch.nan
    product.x_descale[33, 5] = torch.inf
    product.x.view(torch.uint8)[59, 1000] = 0x7F  # NaN in e4m3
    bad = run(product, torch.bfloat16, tiles).isfinite().logical_not()
    assert bad[:, 128:256].all()
    assert bad[[33, 59]].all()
    bad[:, 128:256] = bad[[33, 59]] = False
    assert not bad.any()


@pytest.mark.parametrize("tiles", TILES)
def test_replays_from_a_graph(tiles: tuple[int, int, int, int]) -> None:
    """And comes to the same bits every time, one call behind the other: none begins before its parts are added."""
    product = make_product(64, 2112, 2048, quantized=True, device="cuda")
    want = run(product, torch.bfloat16, tiles)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [run(product, torch.bfloat16, tiles) for _ in range(5)]
    for _ in range(50):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, want) for out in outs)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_that_nobody_has_added(parts: int) -> None:
    product = make_product(50, 2112, 7168, quantized=True, kind="outliers", device="cuda")
    got = fp8_linear_parts(*product.tensors, parts, impl="stream")
    assert got.shape == (parts, 50, 2112)
    assert not worst(sum(got[1:], got[0]).bfloat16(), *exact(product, torch.bfloat16))
    want = fp8_linear_parts(*product.tensors, parts, impl="reference")
    assert (got - want).norm() <= 1e-3 * want.norm(), "part by part"


def test_it_can_be_asked_for() -> None:
    product = make_product(48, 1024, 1024, quantized=True, device="cuda")
    got = fp8_linear(*product.tensors, torch.bfloat16, impl="stream")
    assert not worst(got, *exact(product, torch.bfloat16))


@pytest.mark.parametrize(
    ("m", "rows", "k"), [(64, (1536, 576), 7168), (20, (1280, 200), 784), (128, (256, 16384), 144)]
)
@pytest.mark.parametrize("impl", ["stream", "triton", "triton weight only", "auto"])
def test_two_weights_in_one_launch(m: int, rows: tuple[int, int], k: int, impl: str) -> None:
    first, second = (make_product(m, n, k, quantized="only" not in impl, kind="outliers", device="cuda") for n in rows)
    second = Product(first.x, first.x_descale, second.weight, second.weight_descale)
    weights, descales = [first.weight, second.weight], [first.weight_descale, second.weight_descale]
    got = fp8_stacked(first.x, first.x_descale, weights, descales, torch.bfloat16, impl=impl.split()[0])
    assert got.is_contiguous()
    for part, product in zip(got.split(rows, 1), (first, second), strict=True):
        assert not worst(part, *exact(product, torch.bfloat16))


@pytest.mark.parametrize("kind", ["plain", "outliers", "zeros"])
@pytest.mark.parametrize(
    ("m", "rows", "k"), [(64, (1536, 576), 7168), (33, (2112,), 7168), (64, (1280, 200), 784), (128, (20000,), 2064)]
)
def test_the_root_of_a_norm(m: int, rows: tuple[int, ...], k: int, kind: str) -> None:
    case = make_normed(m, rows, k, kind=kind, device="cuda")
    got = fp8_normed(*case.arguments, torch.bfloat16, eps=case.eps, impl="stream")
    assert got.is_contiguous()
    assert not worst_normed(case, got)
    # What products in FP8 may be off hides a wrong root, so it is held against the same kernel without one. Parts of K
    # are multiplied before they are added: a rounding of each, of the size of what is summed.
    x, x_descale, squares, weights, descales = case.arguments
    if len(weights) > 1:
        products = fp8_stacked(x, x_descale, weights, descales, torch.bfloat16, impl="stream")
    else:
        products = fp8_linear(x, x_descale, weights[0], descales[0], torch.bfloat16, impl="stream")
    root = torch.rsqrt(squares.double().sum(1, keepdim=True) / k + case.eps)
    sizes = torch.cat([exact(_without_signs(product), torch.bfloat16)[0] for product in case.products], 1)
    allowed = 2.0**-7 * products.double().abs() + 2 * MOST_PARTS * 2.0**-24 * sizes
    assert (
        (got - products.double() * root).abs() <= allowed * root + torch.finfo(torch.bfloat16).smallest_normal
    ).all()


def _without_signs(product: Product) -> Product:
    x, weight = (t.float().abs().to(t.dtype) for t in (product.x, product.weight))
    return Product(x, product.x_descale, weight, product.weight_descale)
