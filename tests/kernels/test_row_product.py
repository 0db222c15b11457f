"""``row_product`` and ``head_product``: the references, their checks, the kernels' logic in Triton's interpreter, what
they compile to, and their parity on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels.head_product.supports import triton_reasons as head_reasons
from mlacompile.kernels.row_product.supports import fp8_reasons, triton_reasons
from mlacompile.ops import head_product, row_product, row_product_reference
from mlacompile.ops.fp8_linear import fp8_dequantize_weight
from mlacompile.testing.scaled import KINDS, make_product

SHAPES = [(576, 7168), (24576, 1536), (2048, 10944), (7, 8), (1000, 2056), (33, 24)]


def test_reference_is_the_product() -> None:
    x, weight = torch.randn(1, 24), torch.randn(7, 24)
    other = torch.randn(5, 24)
    got = row_product(x, [weight, other], [])
    assert torch.equal(got[0], x @ weight.t())
    assert torch.equal(got[1], x @ other.t())
    torch.library.opcheck(row_product, (x, [weight, other], []))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(2, 8), torch.ones(3, 8)),
        (torch.ones(1, 8), torch.ones(3, 7)),
        (torch.ones(1, 8), torch.ones(3, 8, dtype=torch.bfloat16)),
    ],
)
def test_wrong_inputs_say_what_was_expected(x: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(UnsupportedInputError, match=r"expected \[1, K\] and \[N, K\] of one dtype"):
        row_product(x, [weight], [])


def test_kernel_says_why_not() -> None:
    weight = torch.ones(8, 12, dtype=torch.float32).t()
    reasons = "; ".join(triton_reasons(torch.ones(1, 8), [weight], []))
    assert "float16 and bfloat16" in reasons
    assert "the kernel needs 1" in reasons
    with pytest.raises(UnsupportedInputError, match="cannot take these inputs"):
        row_product(torch.ones(1, 8), [torch.ones(3, 8)], [], impl="triton")


def test_what_stands_around_a_product_is_part_of_it() -> None:
    x, gate, up, g, residual = (
        torch.randn(1, 24),
        torch.randn(7, 24),
        torch.randn(7, 24),
        torch.randn(24),
        torch.ones(1, 7),
    )
    row = torch.nn.functional.rms_norm(x, (24,), g, 1e-3)
    (got,) = row_product(x, [gate, up], [], g, residual, eps=1e-3, gate="silu")
    want = torch.nn.functional.silu(row @ gate.t()) * (row @ up.t()) + residual
    torch.testing.assert_close(got, want)
    torch.library.opcheck(row_product, (x, [gate, up], [], g, residual), {"eps": 1e-3, "gate": "silu"})


def test_weights_in_fp8_are_what_they_stand_for() -> None:
    first, second = (make_product(1, 200, 144, dtype=torch.float32, seed=seed) for seed in (0, 7))
    weights, descales = [first.weight, second.weight], [first.weight_descale, second.weight_descale]
    g = torch.randn(144)
    wide = [fp8_dequantize_weight(w, s, torch.float32) for w, s in zip(weights, descales, strict=True)]
    for settings in ({"eps": 1e-6}, {"eps": 1e-6, "gate": "gelu"}):
        got = row_product(first.x, weights, descales, g, **settings)
        for one, other in zip(got, row_product(first.x, wide, [], g, **settings), strict=True):
            assert torch.equal(one, other)
    # Not its schema: that test computes with its inputs, and PyTorch multiplies no FP8 on a CPU.
    torch.library.opcheck(row_product, (first.x, weights, descales, g), {"eps": 1e-6}, test_utils="test_faketensor")
    with pytest.raises(UnsupportedInputError, match="1 scales for 2 weights"):
        row_product(first.x, weights, descales[:1])
    with pytest.raises(UnsupportedInputError, match=r"expected torch.float8_e4m3fn.*\[2, 2\]"):
        row_product(first.x, weights, [descales[0], descales[1][:1]])
    assert "takes those of the dtype of x" in "; ".join(triton_reasons(first.x, weights, descales))
    assert fp8_reasons(first.x, wide, []) == ["weights have no scales, the kernel takes FP8"]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"norm": torch.ones(7)}, {}, "got norm \\[7\\]; expected \\[8\\]"),
        ({"added": torch.ones(1, 3)}, {}, "for 2 results"),
        ({}, {"gate": "tanh"}, "expected one of silu, gelu, gelu_tanh and two weights"),
        ({}, {"gate": "silu"}, "two weights of one shape"),
    ],
)
def test_surroundings_that_do_not_fit(arguments: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        row_product(torch.ones(1, 8), [torch.ones(3, 8), torch.ones(4, 8)], [], **arguments, **settings)


def test_head_product_is_the_batched_product() -> None:
    x, weight = torch.randn(3, 1, 24), torch.randn(3, 24, 7)
    torch.testing.assert_close(head_product(x, weight), torch.bmm(x, weight))
    torch.library.opcheck(head_product, (x, weight))
    with pytest.raises(UnsupportedInputError, match=r"expected \[H, 1, K\] and \[H, K, N\]"):
        head_product(torch.ones(3, 2, 24), weight)
    assert "float16 and bfloat16" in "; ".join(head_reasons(x, weight))


def test_kernel_logic() -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    script = Path(__file__).with_name("interpreted_rows.py")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("gate", ["", "silu", "gelu", "gelu_tanh"])
def test_rows_are_read_in_whole_pieces(gate: str) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    from mlacompile.kernels.row_product.launch import launch
    from mlacompile.kernels.row_product.portable import _row_product_kernel
    from mlacompile.testing.sass import compile_for, table

    x, weights = _meta(1, 7168), [_meta(2048, 7168), _meta(2048, 7168)]
    out = [_meta(1, 2048) for _ in (weights[:1] if gate else weights)]
    added = _meta(1, 2048) if gate else None
    _, arguments, options = launch(x, weights, out, _meta(7168), added, 1e-6, gate)
    built = compile_for(_row_product_kernel, arguments, options, capability=90, name=f"row_product {gate}")
    print(table([built]))
    assert built.local_memory == built.spill_bytes == 0
    assert built.counts["LDG.128"] * 16 * 32 * options["num_warps"] >= 2 * arguments["BLOCK_N"] * arguments["BLOCK_K"]


@pytest.mark.parametrize("gate", ["", "silu", "gelu", "gelu_tanh"])
def test_rows_in_fp8_pass_nothing_through_shared_memory(gate: str) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    from mlacompile.kernels.fp8_linear.launch import choose_row_tiles, rows_launch
    from mlacompile.testing.sass import compile_for, table

    weights = [torch.empty(4096, 7168, dtype=torch.float8_e4m3fn, device="meta") for _ in range(2)]
    descales = [torch.empty(32, 56, device="meta") for _ in weights]
    out = [_meta(1, 4096) for _ in (weights[:1] if gate else weights)]
    added = _meta(1, 4096) if gate else None
    launch = rows_launch(
        _meta(1, 7168), None, weights, descales, out, norm=_meta(7168), added=added, eps=1e-6, gate=gate
    )
    built = compile_for(launch.kernel, launch.arguments, launch.options, capability=90, name=f"row_product, FP8 {gate}")
    print(table([built]))
    assert built.local_memory == built.spill_bytes == 0
    assert built.registers <= 128
    assert built.smem <= 256 * launch.options["num_warps"], "only sums pass through shared memory"
    tiles = choose_row_tiles(1, 8192, 7168, norm=True, gate=bool(gate))
    assert built.counts["FFMA"] >= 2 * tiles.rows * tiles.unroll * (tiles.width - 1), "one instruction a product"


@pytest.mark.parametrize("along_k", [False, True])
def test_heads_are_read_in_whole_pieces(along_k: bool) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    from mlacompile.kernels.head_product.launch import launch
    from mlacompile.kernels.head_product.portable import _head_product_kernel
    from mlacompile.testing.sass import compile_for, table

    up = _meta(128, 256, 512)
    weight = up[:, 128:].transpose(1, 2) if along_k else up[:, :128]
    _, k, n = weight.shape
    _, arguments, options = launch(_meta(128, 1, k), weight, _meta(128, 1, n))
    built = compile_for(_head_product_kernel, arguments, options, capability=90, name=f"head_product {along_k}")
    _, early, chained = launch(_meta(128, 1, k), weight, _meta(128, 1, n), early=True)
    sooner = compile_for(_head_product_kernel, early, chained, capability=90, name=f"head_product {along_k}, early")
    print(table([built, sooner]))
    assert built.local_memory == built.spill_bytes == 0
    assert built.too_early == 0 < sooner.too_early, "weights that nobody writes are read before others have ended"
    assert built.counts["LDG.128"] * 16 * 32 * options["num_warps"] >= 2 * arguments["BLOCK_N"] * arguments["BLOCK_K"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity(n: int, k: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, k, device="cuda").to(dtype)
    weights = [torch.randn(rows, k + 8, device="cuda").to(dtype)[:, :k] for rows in (n, 7, 33)]  # rows lie apart
    for got, weight in zip(row_product(x, weights, [], impl="triton"), weights, strict=True):
        want = x.double() @ weight.double().t()
        rounded = (x.float() @ weight.float().t()).to(dtype).double()
        # float32 sums rounded once: no farther from float64 than the float32 product rounded once, and half a unit
        allowed = (rounded - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gate", ["", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("k", [1536, 7168, 18432, 2056])
def test_parity_of_what_stands_around(gate: str, k: int) -> None:
    dtype, n = torch.bfloat16, 2112
    x, g = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((1, k), (k,)))
    weights = [(torch.randn(n, k, device="cuda") / k**0.5).to(dtype) for _ in range(2 if gate else 1)]
    residual = torch.randn(1, n, device="cuda").to(dtype)
    (got,) = row_product(x, weights, [], g, residual, eps=1e-6, gate=gate, impl="triton")
    (want,) = row_product_reference(
        x.double(), [w.double() for w in weights], [], g.double(), residual.double(), eps=1e-6, gate=gate
    )
    # float32 throughout: k roundings of a sum of order one, then one of the result to 16 bits
    allowed = torch.finfo(dtype).eps * want.abs() + k * 2**-24 * 8
    assert ((got.double() - want).abs() <= allowed).all()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (300, 1536), (1000, 2064), (130, 18432)])
def test_parity_of_fp8(n: int, k: int, gate: str, kind: str) -> None:
    products = [make_product(1, n, k, kind=kind, device="cuda", seed=seed) for seed in (0, 7)]
    x, weights, descales = products[0].x, [p.weight for p in products], [p.weight_descale for p in products]
    wide = [fp8_dequantize_weight(w, s, torch.float64) for w, s in zip(weights, descales, strict=True)]
    g = torch.randn(k, device="cuda").bfloat16()
    residual = torch.randn(1, n, device="cuda").bfloat16() if gate else None
    got = row_product(x, weights, descales, g, residual, eps=1e-6, gate=gate, impl="gluon")
    row = x.double() * torch.rsqrt(x.double().square().mean() + 1e-6) * g.double()
    added = None if residual is None else residual.double()
    want = row_product_reference(row, wide, [], None, added, eps=0.0, gate=gate)
    # Sums in float32, in any order, of products scaled twice, and a norm: relative to the sum of their sizes.
    terms = (k + 16) * 2.0**-23
    sums, sizes = [row @ w.t() for w in wide], [row.abs() @ w.abs().t() for w in wide]
    if gate:  # no activation is steeper than 1.13, nor larger than what goes in
        bounds = [terms * (1.13 * sizes[0] * (sums[1].abs() + terms * sizes[1]) + sums[0].abs() * sizes[1])]
        bounds[0] += (sums[0] * sums[1]).abs() * 2.0**-20  # exp and erf
    else:
        bounds = [terms * size for size in sizes]
    for one, exact, bound in zip(got, want, bounds, strict=True):
        assert one.isfinite().all()
        assert ((one.double() - exact).abs() <= bound + exact.abs() * 2.0**-8 * 1.01).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize(("h", "k", "n"), [(128, 128, 512), (128, 512, 128), (5, 192, 384), (16, 1040, 40)])
def test_parity_of_heads(along_k: bool, h: int, k: int, n: int) -> None:
    dtype = torch.bfloat16
    x = torch.randn(h, 1, k + 64, device="cuda").to(dtype)[:, :, :k]
    weight = (torch.randn(h, *((n, k) if along_k else (k, n)), device="cuda") / k**0.5).to(dtype)
    weight = weight.transpose(1, 2) if along_k else weight
    want = torch.bmm(x.double(), weight.double())
    allowed = torch.finfo(dtype).eps * want.abs() + k * 2**-24 * 8
    assert ((head_product(x, weight, impl="triton").double() - want).abs() <= allowed).all()
