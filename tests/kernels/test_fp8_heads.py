"""The Hopper kernel for a weight of each head without a GPU: what it compiles to and refuses, its text as Python."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlacompile.kernels import registry
from mlacompile.kernels.device import SMEM
from mlacompile.kernels.fp8_linear import supports
from mlacompile.ops.heads_quantized import empty_results, heads_quantized_reference
from mlacompile.testing.heads import make_heads, worst_quantized
from mlacompile.testing.scaled import E4M3, KINDS, Product, exact, make_product, worst

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

from mlacompile.kernels.fp8_linear import heads, heads_launch
from mlacompile.testing.sass import compile_for, table
from tests.kernels import gluon_in_python

F16 = torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, F16])
@pytest.mark.parametrize(
    ("m", "many", "n", "k", "leave"),
    [
        (64, 128, 512, 128, "rows"),
        (64, 128, 128, 512, "quantized, spent"),
        (33, 5, 208, 96, "rows"),
        (1, 1, 128, 128, "quantized, spent"),
        (20, 16, 256, 512, "rows"),  # the largest head there can be
    ],
)
def test_what_it_compiles_to(
    m: int, many: int, n: int, k: int, leave: str, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks_n, blocks_k = -(-n // 128), -(-k // 128)
    x = meta(m, many, k + 64, dtype=dtype)[..., :k].transpose(0, 1)
    weight, descale = meta(many, n, k, dtype=E4M3), meta(many, blocks_n, blocks_k)
    out = meta(many, m, n, dtype=dtype) if leave == "rows" else (meta(m, many * 128, dtype=E4M3), meta(m, many))
    launch = heads_launch.heads_launch(x, weight, descale, out, spent="spent" in leave)
    assert launch.grid == (many,)
    built = compile_for(launch.kernel, launch.arguments, launch.options, name=f"heads {leave} {m}x{n}x{k}")
    record_property("compiled", table([built]))
    assert built.counts["HGMMA"] == blocks_n * blocks_k * 128 // 16, "64 rows by 16 columns of each block at once"
    assert built.counts["UTMALDG"] == blocks_n * blocks_k + blocks_k, "all of a head comes by TMA"
    assert built.counts["UTMASTG"] == (blocks_n if leave == "rows" else 0)
    assert built.counts["QGMMA"] == built.counts["HMMA"] == built.counts["LDGSTS"] == 0
    assert built.counts["DEPBAR"] == blocks_n * blocks_k, "a block is waited for when the next one is widened"
    assert built.serialized == 0, "ptxas found a wgmma whose operands are still in use, and waits for it"
    assert built.unordered == 0, "a thread arrives for warps that may not have come so far"
    assert built.too_early == 0, "what the kernel in front of it writes is read before that has ended"
    assert built.local_memory == built.spill_bytes == 0
    assert built.smem <= SMEM


def test_it_says_why_not() -> None:
    def reasons(m: int, n: int, k: int, result: torch.dtype = torch.bfloat16, **kinds: Any) -> str:
        product = make_product(m, n, k, **({"heads": 2} | kinds))
        return "; ".join(supports.heads_reasons(*product.tensors, result))

    for n, k in ((128, 512), (512, 128), (8, 16), (256, 512), (512, 256)):
        assert reasons(64, n, k).count(";") == 0, "only that there is no GPU here"
        assert "CUDA device" in reasons(64, n, k)
    assert "one weight for all rows" in reasons(4, 128, 128, heads=0)
    assert "x is quantized" in reasons(4, 128, 128, quantized=True)
    assert "x is torch.float32" in reasons(4, 128, 128, torch.float32, dtype=torch.float32)
    assert "the result is torch.float32" in reasons(4, 128, 128, torch.float32)
    assert "x has 65 rows, the kernel takes 1 to 64" in reasons(65, 128, 128)
    assert "a head of [640, 256] needs 278528 bytes of shared memory" in reasons(4, 640, 256)
    assert "a head of [128, 1024]" in reasons(4, 128, 1024)
    assert "rows of 300 results" in reasons(4, 300, 128)
    assert "rows of x are not a multiple of 16 bytes" in reasons(4, 128, 200)


def test_what_fits_fits_by_hand() -> None:
    """Beside everything of a head there is room for its barriers."""
    for n, k in ((1, 1), (2, 4), (4, 2), (1, 6), (6, 1)):
        product = make_product(1, 128 * n, 128 * k, heads=1, dtype=F16)
        assert not any("shared memory" in reason for reason in supports.heads_reasons(*product.tensors, F16))
        assert 128 * 128 * n * k + 2 * 64 * 128 * (n + k) + 8 * n * k <= SMEM - 1024


def test_a_head_is_a_program_where_that_fills_the_sms() -> None:
    def chosen(heads: int, m: int, n: int, k: int) -> str:
        x, weight = torch.empty(heads, m, k, device="meta"), torch.empty(heads, n, k, device="meta")
        tensors = x, None, weight, torch.empty(heads, -(-n // 128), -(-k // 128), device="meta"), torch.bfloat16
        able = {"gluon": m <= supports.MOST_ROWS, "heads": m <= supports.GROUP_ROWS, "triton": True}
        kernels = [kernel for kernel in registry.kernels("fp8_linear") if able.get(kernel.name)]
        return next(kernel.name for kernel in kernels if not kernel.slower(*tensors))

    assert chosen(128, 1, 512, 128) == "gluon"
    assert chosen(128, 2, 512, 128) == chosen(128, 16, 512, 128) == chosen(128, 65, 128, 512) == "triton"
    assert chosen(128, 17, 512, 128) == chosen(128, 64, 128, 512) == "heads"
    assert chosen(64, 64, 512, 128) == chosen(160, 64, 128, 512) == "triton", "of 132 SMs"
    assert "faster with 16 rows" in supports.heads_slower(*make_product(16, 128, 128, heads=2).tensors, F16)[0]


def test_quantized_fewer_heads_are_enough() -> None:
    (kernel,) = registry.kernels("heads_quantized")

    def slower(heads: int) -> list[str]:
        x, weight = torch.empty(heads, 64, 512, device="meta"), torch.empty(heads, 128, 512, device="meta")
        return kernel.slower(x, weight, torch.empty(heads, 1, 4, device="meta"))

    assert not slower(64)
    assert not slower(128)
    assert "on more SMs with 16 heads" in slower(16)[0]
    assert "160 heads are more than there are SMs" in slower(160)[0]


def in_python(
    product: Product, out: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *, spent: bool = False,
    change: gluon_in_python.Change = lambda replaced: None,
) -> None:  # fmt: skip
    """The kernel's own text, its launch as it is."""
    with pytest.MonkeyPatch.context() as patched:
        # Memory of a CPU begins anywhere.
        patched.setattr(heads_launch, "in_whole_lines", lambda t: t.stride(1) * t.itemsize % 128 == 0)
        x, _, weight, descale = product.tensors
        launch = heads_launch.heads_launch(x, weight, descale, out, spent=spent)
    gluon_in_python.run([heads], launch, change)


def room(product: Product) -> torch.Tensor:
    """For results, between others."""
    many, m, _ = product.x.shape
    return torch.full((many + 2, m, product.weight.shape[1]), torch.nan, dtype=product.x.dtype)


def quantized(product: Product, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The results, and nothing behind them is written."""
    q, descale = empty_results(product.x)
    large = torch.full((q.numel() + 4096,), 0x55, dtype=torch.uint8)
    scales = torch.full((descale.numel() + 64,), 0.5)
    results = large.view(E4M3)[: q.numel()].view(q.shape), scales[: descale.numel()].view(descale.shape)
    in_python(product, results, **settings)
    assert (large[q.numel() :] == 0x55).all()
    assert (scales[descale.numel() :] == 0.5).all()
    return results


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 64), st.integers(1, 3), st.integers(1, 32), st.integers(1, 24), st.sampled_from(KINDS))
@example(64, 1, 64, 8, "plain")
@example(3, 1, 25, 32, "outliers")
def test_rows_in_python(m: int, many: int, n: int, k: int, kind: str) -> None:
    product = make_heads(m, many, 8 * n, 16 * k, kind=kind, dtype=F16)
    out = room(product)
    in_python(product, out[1:-1])
    want, bound = exact(product, F16)
    bound = torch.where(want.abs() > 6e4, torch.inf, bound)  # what float16 cannot hold becomes infinite
    assert not worst(out[1:-1].where(bound.isfinite(), 0), want.where(bound.isfinite(), 0), bound)
    assert out[[0, -1]].isnan().all(), "written beyond its heads"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(1, 3), st.integers(1, 48), st.sampled_from(["plain", "tiny", "zeros"]))
def test_quantized_rows_in_python(m: int, many: int, k: int, kind: str) -> None:
    product = make_heads(m, many, 128, 16 * k, kind=kind, dtype=F16)
    assert not worst_quantized(product, quantized(product))


def test_what_is_spent_is_dropped_and_nothing_else() -> None:
    product = make_heads(20, 3, 128, 256, dtype=F16)
    want = quantized(product)
    rows = product.x._base
    assert rows is not None
    rows.copy_(rows.nan_to_num(nan=7.0))
    got = quantized(product, spent=True)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert product.x.isnan().all()
    product.x.fill_(7.0)
    assert (rows == 7).all()
    odd = make_heads(20, 3, 128, 96, dtype=F16)
    quantized(odd, spent=True)
    assert odd.x.isfinite().all(), "lines that hold something else as well"


def test_what_is_not_finite_stays_where_it_is() -> None:
    product = make_heads(20, 3, 128, 256, dtype=F16)
    product.x[1, 3, 7], product.x[2, 19, 255] = torch.nan, -torch.inf
    product.x[0, 5] = 0
    q, descale = quantized(product)
    _, want = heads_quantized_reference(product.x, product.weight, product.weight_descale)
    assert torch.equal(descale.isnan(), want.isnan())
    assert descale.isnan().nonzero().tolist() == [[3, 1], [19, 2]]
    assert descale[5, 0] == 1
    assert (q.view(torch.uint8)[5, :128] & 0x7F == 0).all()


def test_a_wait_that_is_left_out_is_found() -> None:
    """What this emulator is for: it would find these."""
    product = make_heads(20, 1, 256, 128, dtype=F16)

    def impatient(replaced: dict[str, Any]) -> None:
        waits, wait = count(), replaced["mbarrier"].wait
        replaced["mbarrier"].wait = lambda *args: next(waits) == 1 or wait(*args)

    def hurried(replaced: dict[str, Any]) -> None:
        replaced["tma"].store_wait = lambda pendings: None

    def unfenced(replaced: dict[str, Any]) -> None:
        replaced["fence_async_shared"] = lambda: None

    out = room(product)
    with pytest.raises(AssertionError, match="ends before its results have left"):
        in_python(product, out[1:-1], change=hurried)
    with pytest.raises(AssertionError, match="without a fence"):
        in_python(product, out[1:-1], change=unfenced)
    in_python(product, out[1:-1], change=impatient)
    assert out[1, :, 128:].isnan().all()
