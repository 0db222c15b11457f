"""``fp8_linear`` without a GPU: what kernels compile to, what they say against inputs, and the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry
from mlacompile.kernels.fp8_linear.supports import blas_reasons, slower_than_16_bits, tiles_slower
from mlacompile.lowering.select import slower_in_fp8
from mlacompile.ops.fp8_linear import fp8_linear
from mlacompile.testing.scaled import E4M3, make_product

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")

from mlacompile.kernels.fp8_linear.launch import choose_row_tiles, choose_tiles, rows_launch, tiles_launches
from mlacompile.testing.sass import compile_for, table


def meta(m: int, n: int, k: int, heads: int, quantized: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Arguments of a launch, on no device."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty([*([heads] if heads else []), *shape], dtype=dtype, device="meta")

    groups = -(-k // 128)
    return (
        empty(m, k, dtype=E4M3 if quantized else torch.bfloat16),
        empty(m, groups, dtype=torch.float32) if quantized else None,
        empty(n, k, dtype=E4M3),
        empty(-(-n // 128), groups, dtype=torch.float32),
        empty(m, n, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize(
    ("m", "n", "k", "heads", "quantized"),
    [(1, 24576, 1536, 0, False), (1, 7168, 16384, 0, True), (2, 2112, 7168, 0, False), (1, 512, 128, 128, False)],
)
def test_few_rows_pass_nothing_through_shared_memory(m: int, n: int, k: int, heads: int, quantized: bool) -> None:
    x, x_descale, weight, descale, out = meta(m, n, k, heads, quantized)
    launch = rows_launch(x, x_descale, [weight], [descale], [out])
    built = compile_for(launch.kernel, launch.arguments, launch.options)
    print(table([built]))
    assert built.spill_bytes == built.local_memory == 0
    assert built.registers <= 168
    assert built.smem <= 32 * m * launch.options["num_warps"], "only sums pass through shared memory"
    tiles = choose_row_tiles(m, n, k)
    assert built.counts["FFMA"] >= m * tiles.rows * tiles.width, "one instruction a product"


@pytest.mark.parametrize(
    ("m", "n", "k", "heads", "quantized", "product"),
    [
        (16, 24576, 1536, 0, False, "HGMMA"),
        (64, 7168, 16384, 0, True, "QGMMA"),
        (128, 2112, 7168, 0, True, "QGMMA"),
        (64, 512, 128, 128, False, "HGMMA"),
    ],
)
def test_tiles_run_on_wgmma(m: int, n: int, k: int, heads: int, quantized: bool, product: str) -> None:
    x, x_descale, weight, descale, out = meta(m, n, k, heads, quantized)
    launches = tiles_launches(x, x_descale, [weight], [descale], out)
    main, *rest = [compile_for(x.kernel, x.arguments, x.options, name=x.kernel.__name__) for x in launches]
    print(table([main, *rest]))
    assert main.counts[product] > 0
    assert main.counts["HMMA"] == 0
    assert main.counts["UTMALDG"] > 0, "tiles should come by TMA"
    assert main.spill_bytes == main.local_memory == main.serialized == 0
    assert all(built.too_early == 0 for built in (main, *rest)), "they may be launched before what they read is there"
    assert len(rest) == (n < 16384 and not heads), "K is divided where one weight has few tiles"


def test_tiles_of_two_weights() -> None:
    x, x_descale, weight, descale, _ = meta(64, 1536, 7168, 0, True)
    _, _, other, other_descale, out = meta(64, 576, 7168, 0, True)
    out = torch.empty(64, 1536 + 576, dtype=out.dtype, device="meta")
    main, _ = tiles_launches(x, x_descale, [weight, other], [descale, other_descale], out)
    built = compile_for(main.kernel, main.arguments, main.options)
    assert main.grid[0] == (1536 + 576) // 64
    assert built.counts["QGMMA"] == 4, "one loop, whichever the weight"
    assert built.spill_bytes == built.local_memory == built.serialized == 0


def test_tiles_fill_the_gpu() -> None:
    assert choose_tiles(16, 24576, 1536, 1, 132).parts == 1
    assert choose_tiles(16, 2112, 7168, 1, 132).parts == 4
    assert choose_tiles(16, 2112, 512, 1, 132).parts == 1, "short rows are not worth a second kernel"
    assert choose_tiles(64, 7168, 16384, 1, 132).parts == 2, "56 tiles would leave half of it idle"
    assert choose_row_tiles(1, 512, 128).lanes == 8, "rows of 128 values leave lanes for other rows"


def test_kernels_say_why_not() -> None:
    product = make_product(5, 128, 200)
    for kernel in registry.kernels("fp8_linear"):
        assert "CUDA device" in "; ".join(kernel.supports(*product.tensors, torch.bfloat16))
    with pytest.raises(UnsupportedInputError, match=r"impl='triton' cannot take these inputs.*CUDA device"):
        fp8_linear(*product.tensors, torch.bfloat16, impl="triton")
    with pytest.raises(UnsupportedInputError, match="it has gluon, heads, triton, stream, hopper, cublas"):
        fp8_linear(*product.tensors, torch.bfloat16, impl="fast")
    assert blas_reasons(*product.tensors, torch.bfloat16)


def test_what_is_slower_says_so() -> None:
    assert slower_than_16_bits(1, 7168, 16384, 0) is None
    assert "few" not in str(slower_than_16_bits(1, 128, 128, 0))
    assert "so small" in str(slower_than_16_bits(1, 128, 128, 0))
    assert "128 rows a head" in str(slower_than_16_bits(128, 512, 128, 128))
    assert slower_than_16_bits(128, 128, 512, 128) is None
    assert "only 2112 rows" in str(slower_than_16_bits(512, 2112, 7168, 0))
    assert slower_than_16_bits(4096, 2112, 7168, 0) is None
    x = torch.empty(4096, 512, device="meta")
    assert "decided on the device" in str(slower_in_fp8(x, x))
    assert "on cpu" in str(slower_in_fp8(torch.empty(1, 512), torch.empty(512, 512)))
    assert "many rows are faster with 4096 rows" in tiles_slower(x, None, x, x, torch.bfloat16)[0]


CASES = [
    ({"m": 5, "n": 200, "k": 272, "quantized": True, "kind": "outliers"}, {}),
    ({"m": 5, "n": 200, "k": 784, "quantized": True, "kind": "zeros"}, {"parts": 3}),
    ({"m": 3, "n": 100, "k": 144, "heads": 3, "quantized": True, "kind": "tiny"}, {}),
    ({"m": 20, "n": 140, "k": 144, "kind": "plain", "dtype": "float16"}, {"block_n": 128}),
    ({"m": 33, "n": 70, "k": 128, "quantized": True, "kind": "plain"}, {"block_m": 32}),
]


def test_the_interpreter_agrees() -> None:
    cases = [(case, {"block_m": 16, "block_n": 64, "warps": 4, "stages": 3, **tiles}) for case, tiles in CASES]
    text = repr(cases).replace("'float16'", "torch.float16")
    script = Path(__file__).parent / "interpreted_fp8_linear.py"
    done = subprocess.run(
        [sys.executable, str(script), text],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
