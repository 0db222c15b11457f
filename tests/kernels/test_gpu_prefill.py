"""``mla_prefill`` on a GPU: PyTorch's kernels give the log-sum-exps that merging relies on, and no more memory
than promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlacompile.kernels.mla_prefill import attend as attend_module
from mlacompile.kernels.mla_prefill.attend import attend
from mlacompile.kernels.mla_prefill.chunked import mla_prefill_chunked
from mlacompile.kernels.mla_prefill.windows import Window, windows_of
from mlacompile.ops import mla_prefill_reference
from mlacompile.ops.visible_bounds import visible_bounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(
    queries: int, tokens: int, *, heads: int = 4, batch: int = 2, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Any], dict[str, Any]]:
    """V3's widths, few heads, causal."""
    draw = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda").to(dtype)

    q, cache = randn(batch, queries, heads, 192).transpose(1, 2), randn(batch, tokens, 576)
    up = randn(heads, 256, 512) / 512**0.5
    c_kv, k_pe = cache.split([512, 64], -1)
    settings = {"scale": 192**-0.5, "causal": True, "nope_at": 0, "pe_at": 128, "chunk": 256}
    return [q, c_kv, k_pe, up[:, :128], up[:, 128:], None, None, None], settings


def close(tensors: list[Any], settings: dict[str, Any], **more: Any) -> None:
    """Against the reference in float64; values and weights are rounded to the dtype a handful of times on the way."""
    out, lse = mla_prefill_chunked(*tensors, **settings, **more)
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
    want, want_lse = mla_prefill_reference(*wide, **settings)
    eps = torch.finfo(out.dtype).eps
    assert float((out.double() - want).abs().max()) <= 4 * eps * float(want.abs().max())
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert float((lse - want_lse)[seen].abs().max()) <= 8 * eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [2, 100, 256, 600])
def test_a_square_and_chunks_before_it(queries: int, dtype: torch.dtype) -> None:
    tensors, settings = inputs(queries, 1000, dtype=dtype)
    close(tensors, settings)


@pytest.mark.parametrize("queries", [5, 300])
@pytest.mark.parametrize("absorb", [0, 1 << 20])
def test_lengths_starts_and_padding(queries: int, absorb: int) -> None:
    tensors, settings = inputs(queries, 900)
    tensors[5] = torch.arange(900, device="cuda").expand(2, 1, 900) >= torch.tensor([[[0]], [[40]]], device="cuda")
    tensors[6] = torch.tensor([0, 7], dtype=torch.int32, device="cuda")
    tensors[7] = torch.tensor([900, 700], dtype=torch.int32, device="cuda")
    tensors[1] = tensors[1].clone()
    tensors[1][1, 700:] = torch.nan
    close(tensors, settings, absorb_up_to=absorb)


def test_a_mask_of_pairs() -> None:
    tensors, settings = inputs(200, 700)
    tensors[5] = torch.rand(2, 200, 700, device="cuda") < 0.5
    close(tensors, settings)


def test_cudnn_serves_what_is_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    honest = attend_module._cudnn_takes
    monkeypatch.setattr(attend_module, "_cudnn_takes", lambda *args: taken.append(honest(*args)) or taken[-1])
    tensors, settings = inputs(256, 1024)
    mla_prefill_chunked(*tensors, **settings)
    assert taken
    if torch.cuda.get_device_capability() >= (9, 0):
        assert all(taken)


def test_log_sum_exps_are_natural() -> None:
    q, k, v = (torch.randn(1, 2, 256, d, device="cuda", dtype=torch.bfloat16) for d in (192, 192, 128))
    for causal in (False, True):
        _, lse = attend(q, k, v, None, None, causal=causal, scale=0.1)
        scores = q.float() @ k.float().transpose(2, 3) * 0.1
        hidden = torch.ones(256, 256, dtype=torch.bool, device="cuda").triu(1) & causal
        want = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(lse, want, atol=2e-2, rtol=0)


def test_it_can_be_captured() -> None:
    """Nothing is read on the host then, and the graph follows the lengths that it finds when it is replayed."""
    tensors, settings = inputs(64, 600)
    tensors[7] = torch.full((2,), 600, dtype=torch.int32, device="cuda")
    mla_prefill_chunked(*tensors, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = mla_prefill_chunked(*tensors, **settings)
    for length in (600, 300, 64):
        tensors[7].fill_(length)
        graph.replay()
        want, _ = mla_prefill_chunked(*tensors, **settings)
        torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)


def test_memory_stays_below_twice_the_cache_and_one_expanded_chunk() -> None:
    tensors, settings = inputs(512, 16384, heads=32, batch=1)
    settings["chunk"] = 2048
    mla_prefill_chunked(*tensors, **settings)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mla_prefill_chunked(*tensors, **settings)
    peak = torch.cuda.max_memory_allocated() - before
    cache, expanded = 2 * 16384 * 576, 2 * 2048 * 32 * 320
    assert peak < 2 * (cache + expanded)


def test_bounds_are_sent_and_not_waited_for() -> None:
    length = torch.zeros(2, dtype=torch.int32, device="cuda")
    arguments = (None, None, length, 2, 900)
    visible_bounds(*arguments)  # the allocator of pinned memory and cuBLAS wait for the device when they are first used
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(1 << 30)  # about half a second
    length.fill_(700)
    bounds = visible_bounds(*arguments)
    done.record()
    assert not done.query()
    assert windows_of(bounds, 900, causal=True) == [Window(0, 700, False)]
