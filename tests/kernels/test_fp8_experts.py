"""The kernel of ``fp8_experts``: in the interpreter, compiled for a Hopper GPU, and on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from mlacompile.kernels.fp8_experts.supports import experts_reasons
from mlacompile.ops.fp8_experts import fp8_experts
from mlacompile.testing.experts import SHAPES, disagreement, disorder
from mlacompile.testing.scaled import E4M3, KINDS

pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_interpreter_agrees() -> None:
    command = [sys.executable, "-m", "tests.kernels.interpreted_fp8_experts"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"


@pytest.mark.parametrize(
    ("m", "experts", "block_m"), [(8, 256, 16), (512, 256, 16), (4096, 256, 32), (65536, 256, 128)]
)
def test_what_it_compiles_to(
    m: int, experts: int, block_m: int, record_property: Callable[[str, object], None]
) -> None:
    from mlacompile.kernels.fp8_experts.launch import choose_expert_tiles, experts_launch
    from mlacompile.testing.sass import compile_for, table

    n, k = 4096, 7168
    assert choose_expert_tiles(m, experts).block_m == block_m
    launch = experts_launch(
        meta(m, k, dtype=E4M3), meta(m, k // 128), meta(experts, n, k, dtype=E4M3), meta(experts, n // 128, k // 128),
        meta(m, dtype=torch.int32), meta(experts + 1, dtype=torch.int32), meta(m, n, dtype=torch.bfloat16),
    )  # fmt: skip
    assert launch.grid == (n // 64, m // block_m + min(m, experts)), "as many tiles as rows can fall into"
    built = compile_for(launch.kernel, launch.arguments, launch.options, name=f"experts {m} of {experts}")
    record_property("compiled", table([built]))
    assert built.counts["QGMMA"] == 4, "a block of 128 columns, 32 at a time"
    assert built.counts["UTMALDG"] >= 1, "weights come by TMA"
    assert built.counts["HGMMA"] == built.counts["HMMA"] == 0
    assert built.serialized == built.local_memory == built.spill_bytes == 0


def test_few_rows_are_ordered_in_one_launch(record_property: Callable[[str, object], None]) -> None:
    from mlacompile.kernels.fp8_experts.launch import order_launch
    from mlacompile.testing.sass import compile_for, table

    launch = order_launch(
        meta(512, dtype=torch.int64), meta(512, dtype=torch.int32), meta(257, dtype=torch.int32)
    )  # fmt: skip
    assert launch.grid == (16 + 9,), "32 rows or 32 beginnings a program"
    built = compile_for(launch.kernel, launch.arguments, launch.options, name="order of 512")
    record_property("compiled", table([built]))
    assert built.local_memory == built.spill_bytes == 0


def test_what_it_does_not_take() -> None:
    x, w = meta(4, 256, dtype=E4M3), meta(2000, 128, 256, dtype=E4M3)
    reasons = "; ".join(experts_reasons(x, meta(4, 2), w, meta(2000, 1, 2), meta(4), torch.bfloat16))
    assert "2000 experts, the kernel takes up to 1024" in reasons
    assert "experts are given as torch.float32" in reasons


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 4096, 7168, 32), (3000, 384, 1024, 8)], ids=str)
def test_parity(shape: tuple[int, int, int, int], kind: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert not disagreement(*shape, kind=kind, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8")
@pytest.mark.parametrize("rows", [1, 8, 130, 4096, 5000])
def test_order(rows: int) -> None:
    """Counted, and of many rows sorted, which need not leave those of an expert as they came."""
    from mlacompile.kernels.fp8_experts.launch import COUNTED_ROWS, in_order

    if rows <= COUNTED_ROWS:
        assert not disorder(rows, 256, device="cuda")
    else:
        expert = torch.randint(-1, 257, (rows,), device="cuda")
        order, starts = in_order(expert, 256)
        assert torch.equal(expert[order.long()], expert.sort().values)
        assert torch.equal(starts, (expert[None] < torch.arange(257, device="cuda")[:, None]).sum(1).int())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8")
def test_a_cuda_graph_replays_other_experts() -> None:
    x, w = torch.randn(64, 256, device="cuda").to(E4M3), torch.randn(8, 128, 256, device="cuda").to(E4M3)
    scales, descale = torch.rand(64, 2, device="cuda"), torch.rand(8, 1, 2, device="cuda")
    expert = torch.zeros(64, dtype=torch.int64, device="cuda")
    fp8_experts(x, scales, w, descale, expert, torch.bfloat16, impl="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8_experts(x, scales, w, descale, expert, torch.bfloat16, impl="triton")
    expert.copy_(torch.randint(-1, 9, (64,)))
    graph.replay()
    assert torch.equal(out, fp8_experts(x, scales, w, descale, expert, torch.bfloat16, impl="triton"))
