"""The Hopper kernel of ``fp8_linear`` on a GPU against float64: edges in every direction, every tile, parts of K."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mlacompile.kernels.fp8_linear.supports import hopper_reasons
from mlacompile.ops.fp8_linear import fp8_linear
from mlacompile.testing.scaled import KINDS, Product, exact, make_product, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
TILES = [(256, 128, 1), (128, 128, 1), (128, 64, 1), (256, 128, 3), (128, 128, 7), (128, 64, 4)]
#: (m, n, k): rows and columns beyond a tile and short of it, K in whole blocks and not, several items a program.
SHAPES = [
    (1, 8, 16),
    (100, 200, 144),
    (128, 2112, 7168),
    (300, 576, 1536),
    (1000, 1096, 784),
    (2500, 3000, 400),
]


def run(product: Product, dtype: torch.dtype, tiles: tuple[int, int, int]) -> torch.Tensor:
    from mlacompile.kernels.fp8_linear.hopper_launch import HopperTiles, fp8_linear_hopper

    assert not hopper_reasons(*product.tensors, dtype)
    assert product.x_descale is not None
    return fp8_linear_hopper(
        product.x, product.x_descale, product.weight, product.weight_descale, dtype, HopperTiles(*tiles)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_parity(m: int, n: int, k: int, kind: str) -> None:
    product = make_product(m, n, k, quantized=True, kind=kind, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        want, bound = exact(product, dtype)
        if dtype == torch.float16:  # what it cannot hold becomes infinite
            bound = torch.where(want.abs() > 6e4, torch.inf, bound)
        for tiles in TILES:
            got = run(product, dtype, tiles)
            assert got.is_contiguous()
            assert got.dtype == dtype
            wrong = worst(got.where(bound.isfinite(), 0), want.where(bound.isfinite(), 0), bound)
            assert not wrong, f"{tiles}: {wrong}"


def test_many_rows() -> None:
    """Bands of tiles, and more items than programs, by rows that repeat: each result is known from one of them."""
    product = make_product(64, 4096, 1040, quantized=True, kind="outliers", device="cuda")
    assert product.x_descale is not None
    many = replace(product, x=product.x.repeat(100, 1), x_descale=product.x_descale.repeat(100, 1))
    for tiles in TILES[:3]:
        want = run(product, torch.bfloat16, tiles)
        assert not worst(want, *exact(product, torch.bfloat16))
        assert torch.equal(run(many, torch.bfloat16, tiles), want.repeat(100, 1)), tiles


@pytest.mark.parametrize("tiles", TILES)
def test_strided_inputs(tiles: tuple[int, int, int]) -> None:
    product = make_product(200, 256, 512, quantized=True, device="cuda")
    assert product.x_descale is not None
    want = run(product, torch.bfloat16, tiles)
    wide = torch.zeros(200, 768, dtype=torch.uint8, device="cuda")
    wide[:, 128:640] = product.x.view(torch.uint8)
    x = wide.view(product.x.dtype)[:, 128:640]
    weight = torch.cat([product.weight.view(torch.uint8)] * 2, 1).view(product.weight.dtype)[:, 512:]
    turned = product.x_descale.t().contiguous().t()
    assert turned.stride() == (1, 200)
    got = run(Product(x, turned, weight, product.weight_descale), torch.bfloat16, tiles)
    assert torch.equal(got, want)


@pytest.mark.parametrize("tiles", TILES)
def test_blocks_that_are_not_finite_stay_where_they_are(tiles: tuple[int, int, int]) -> None:
    product = make_product(300, 384, 1024, quantized=True, device="cuda")
    assert product.x_descale is not None
    product.weight_descale[1, 3] = torch.nan
    product.x_descale[70, 5] = torch.inf
    product.x.view(torch.uint8)[290, 1000] = 0x7F  # NaN in e4m3
    bad = run(product, torch.bfloat16, tiles).isfinite().logical_not()
    assert bad[:, 128:256].all()
    assert bad[[70, 290]].all()
    bad[:, 128:256] = bad[[70, 290]] = False
    assert not bad.any()


@pytest.mark.parametrize("tiles", TILES)
def test_replays_from_a_graph(tiles: tuple[int, int, int]) -> None:
    """And comes to the same bits every time: groups of warps wait for each other as they should."""
    product = make_product(1000, 2112, 2048, quantized=True, device="cuda")
    want = run(product, torch.bfloat16, tiles)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(product, torch.bfloat16, tiles)
    for _ in range(50):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)


def test_it_can_be_asked_for() -> None:
    product = make_product(512, 1024, 1024, quantized=True, device="cuda")
    got = fp8_linear(*product.tensors, torch.bfloat16, impl="hopper")
    assert not worst(got, *exact(product, torch.bfloat16))
