"""The kernels of ``fp8_linear`` on a GPU against float64: rows, heads, odd shapes, outliers, denormals, zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlacompile.kernels import registry
from mlacompile.lowering.select import slower_in_fp8
from mlacompile.ops.fp8_linear import fp8_linear
from mlacompile.testing.scaled import KINDS, exact, make_product, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
KERNELS = ("gluon", "triton", "cublas")
SHAPES = [
    *((m, 576, 1536, 0, q) for m in (1, 2, 3, 16, 17, 64, 100, 128, 300) for q in (False, True)),
    *((m, 2112, 7168, 0, m > 16) for m in (1, 2, 16, 128)),
    *((m, 300, 208, 0, q) for m in (1, 2, 9, 70) for q in (False, True)),
    *((m, *w, False) for m in (1, 2, 5, 16, 64) for w in ((512, 128, 8), (128, 512, 8), (96, 80, 3))),
    (4, 130, 272, 5, True),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k", "heads", "quantized"), SHAPES)
def test_parity(m: int, n: int, k: int, heads: int, quantized: bool, kind: str) -> None:
    product = make_product(m, n, k, heads=heads, quantized=quantized, kind=kind, device="cuda")
    ran = 0
    for dtype in (torch.bfloat16, torch.float32):
        want, bound = exact(product, dtype)
        for kernel in registry.kernels("fp8_linear"):
            if kernel.supports(*product.tensors, dtype):
                continue
            got = fp8_linear(*product.tensors, dtype, impl=kernel.name)
            assert got.is_contiguous()
            assert not worst(got, want, bound), f"{kernel.name}: {worst(got, want, bound)}"
            ran += 1
    assert ran >= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_of_x(dtype: torch.dtype) -> None:
    for m, impl in ((1, "gluon"), (2, "gluon"), (16, "triton")):
        if dtype == torch.float32 and impl == "triton":
            continue
        product = make_product(m, 300, 720, dtype=dtype, device="cuda")
        got = fp8_linear(*product.tensors, dtype, impl=impl)
        assert not worst(got, *exact(product, dtype))


@pytest.mark.parametrize("m", [1, 16])
def test_strided_views(m: int) -> None:
    """Queries of all heads side by side, and the half of a weight that belongs to values."""
    product = make_product(m, 256, 512, heads=4, device="cuda")
    x = torch.randn(m, 4, 640, device="cuda").bfloat16().transpose(0, 1)[..., 64:576]
    weight, descale = product.weight[:, 128:], product.weight_descale[:, 1:]
    got = fp8_linear(x, None, weight, descale, torch.bfloat16, impl="gluon" if m == 1 else "triton")
    want = fp8_linear(x.contiguous(), None, weight.contiguous(), descale.contiguous(), torch.bfloat16)
    assert torch.equal(got, want)


def test_blocks_that_are_not_finite_stay_so() -> None:
    for m, quantized in ((1, False), (16, False), (64, True)):
        product = make_product(m, 256, 256, quantized=quantized, device="cuda")
        product.weight_descale[1, 1] = torch.nan
        for kernel in registry.kernels("fp8_linear"):
            if not kernel.supports(*product.tensors, torch.bfloat16):
                got = fp8_linear(*product.tensors, torch.bfloat16, impl=kernel.name)
                assert got[:, 128:].isnan().all(), kernel.name
                assert got[:, :128].isfinite().all(), kernel.name
        product = make_product(m, 256, 256, quantized=quantized, device="cuda")
        product.weight.view(torch.uint8)[200, 3] = 0x7F  # NaN in e4m3
        got = fp8_linear(*product.tensors, torch.bfloat16)
        assert got[:, 200].isnan().all()


def test_replays_from_a_graph() -> None:
    product: Any = make_product(16, 576, 7168, device="cuda")
    call = lambda: fp8_linear(*product.tensors, torch.bfloat16)  # noqa: E731
    want = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want), "sums of parts come in one order"


def test_kernels_are_chosen_as_they_were_measured() -> None:
    def chosen(m: int, n: int, k: int, quantized: bool) -> str:
        product = make_product(m, n, k, quantized=quantized, device="cuda")
        best, _ = registry.best("fp8_linear", *product.tensors, torch.bfloat16)
        assert best is not None
        return best.name

    assert chosen(1, 2112, 7168, False) == "gluon"
    assert chosen(2, 2112, 7168, False) == "gluon"
    assert chosen(2, 7168, 2048, False) == chosen(16, 2112, 7168, False) == "triton"
    assert chosen(128, 2112, 7168, True) == "triton"
    assert chosen(128, 7168, 2048, True) == "hopper"
    assert chosen(512, 1024, 8192, True) == "cublas"
    x, weight = (torch.empty(n, 7168, device="cuda", dtype=torch.bfloat16) for n in (1, 2112))
    assert slower_in_fp8(x, weight) is None
