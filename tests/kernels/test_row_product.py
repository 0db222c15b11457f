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
from mlacompile.kernels.row_product.supports import triton_reasons
from mlacompile.ops import head_product, row_product, row_product_reference

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
    print(table([built]))
    assert built.local_memory == built.spill_bytes == 0
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
