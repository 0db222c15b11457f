"""Products with one row on a CPU: same numbers, in a form that reads weights fast; everything else stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mlacompile.lowering.cpu_rows import place_cpu_rows

aten = torch.ops.aten


def _traced(function: Callable[..., Tensor], *inputs: Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def _products(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.target in (aten.mm.default, aten.bmm.default, aten.baddbmm.default)]


def _sums(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList))


def _assert_close(got: Tensor, x: Tensor, right: Tensor) -> None:
    want = x.double() @ right.double()
    assert got.shape == want.shape
    bound = 2 * x.shape[-1] * torch.finfo(torch.float32).eps + torch.finfo(got.dtype).eps
    assert ((got.double() - want).abs() <= bound * (x.double().abs() @ right.double().abs())).all()


@pytest.mark.parametrize(("n", "k", "groups"), [(512, 256, 4), (576, 1024, 4), (1030, 64, 2)])
def test_groups_of_rows_are_summed(n: int, k: int, groups: int) -> None:
    x, weight = torch.randn(1, k), torch.randn(n, k)
    gm = _traced(lambda x, w: x @ w.t(), x, weight)
    assert place_cpu_rows(gm) == 1
    assert (_products(gm), _sums(gm)) == ([], groups)
    gm.recompile()
    _assert_close(gm(x, weight), x, weight.t())


def test_groups_of_rows_of_each_head_are_summed() -> None:
    x, weight = torch.randn(4, 1, 256), torch.randn(4, 160, 256)[:, 32:]
    gm = _traced(lambda x, w: torch.bmm(x, w.transpose(1, 2)), x, weight)
    assert place_cpu_rows(gm) == 1
    assert (_products(gm), _sums(gm)) == ([], 4)
    gm.recompile()
    _assert_close(gm(x, weight), x, weight.transpose(1, 2))


def test_inductor_reads_four_rows_in_one_loop() -> None:
    """The form pays only where the sums share a loop, and what stands around them is no kernel of its own."""

    def gated(x: Tensor, w: Tensor) -> Tensor:
        return aten.silu(aten.mul(x, x) @ w.t())

    x, weight = torch.randn(1, 512), torch.randn(1024, 512)
    gm = _traced(gated, x, weight)
    assert place_cpu_rows(gm) == 1
    gm.recompile()
    torch._dynamo.reset()
    with torch.no_grad():
        got, (code,) = run_and_get_code(torch.compile(gm), x, weight)
    torch.testing.assert_close(got, gated(x, weight), rtol=1e-4, atol=1e-3)
    assert "extern_kernels." not in code
    assert code.count("async_compile.cpp_pybinding") == 1
    bodies = [loop.count("tmp_acc3") for loop in code.split("#pragma omp for")]
    assert max(bodies) > 0, code  # the fourth sum of a loop


@pytest.mark.parametrize(("n", "k"), [(512, 256), (576, 1024), (1030, 64)])
def test_without_inductor_a_row_times_a_weight_is_shared_among_threads(n: int, k: int) -> None:
    x, weight = torch.randn(1, k), torch.randn(n, k)
    gm = _traced(lambda x, w: x @ w.t(), x, weight)
    assert place_cpu_rows(gm, fused=False) == 1
    assert (_products(gm), _sums(gm)) == ([aten.baddbmm.default], 0)
    gm.recompile()
    _assert_close(gm(x, weight), x, weight.t())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_weights_of_heads_stay_products(transposed: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 1, 32).to(dtype), torch.randn(4, 32, 48).to(dtype)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    gm = _traced(torch.bmm, x, weight)
    assert place_cpu_rows(gm) == 1
    assert _products(gm) == [aten.baddbmm.default]
    gm.recompile()
    _assert_close(gm(x, weight), x, weight)


@pytest.mark.parametrize(
    ("function", "shapes", "dtype"),
    [
        (lambda x, w: x @ w.t(), [(2, 256), (512, 256)], torch.float32),  # two rows
        (lambda x, w: x @ w.t(), [(1, 8), (16, 8)], torch.float32),  # too small to share
        (lambda x, w: x @ w.t(), [(1, 256), (513, 256)], torch.float32),  # cannot be cut evenly
        (lambda x, w: x @ w.t(), [(1, 256), (512, 256)], torch.bfloat16),  # the library shares it already
        (lambda x, w: x @ w, [(1, 256), (256, 512)], torch.float32),  # not stored by rows
    ],
)
def test_what_would_not_gain_stays(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    gm = _traced(function, *(torch.randn(s).to(dtype) for s in shapes))
    before = str(gm.graph)
    assert place_cpu_rows(gm) == 0
    assert str(gm.graph) == before
