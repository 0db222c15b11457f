"""The loop in C++ against float64: bounds, poison, splits, vectors of every width; what it leaves to the library."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.codecache import CppCodeCache
from torch._inductor.cpp_builder import get_cpp_compiler

from mlacompile.kernels.mla_decode import cpu, cpu_loop
from mlacompile.testing.latents import LatentCase, LatentInputs, exact, make_inputs, worst

#: Relative error of an accumulation step, as for the library.
UNIT = 2**-22

cases = st.builds(
    LatentCase,
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 3, 16, 33]),
    queries=st.integers(1, 8),
    tokens=st.integers(1, 150),
    rank=st.sampled_from([16, 64]),
    rope=st.sampled_from([0, 1, 8]),
    dtype=st.just(torch.float32),
    fused=st.booleans(),
    start=st.booleans(),
    length=st.booleans(),
    causal=st.booleans(),
    poison=st.booleans(),
)


def check(inputs: LatentInputs, splits: int | None = None) -> None:
    """Through ``mla_decode_cpu``, which must hand the call to the loop."""
    taken: list[Any] = []
    loop = cpu_loop.mla_decode_loop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "mla_decode_loop", lambda *a, **k: taken.append(a) or loop(*a, **k))
        patch.setattr(cpu, "_attend", None)
        out, lse = cpu.mla_decode_cpu(*inputs.tensors, **inputs.keywords, stretches=splits)  # type: ignore[arg-type]
    want = exact(inputs, unit=UNIT)
    assert not worst(out, want.out, want.out_bound), f"out: {worst(out, want.out, want.out_bound)}"
    lse_bound = want.lse_bound + 2**-24 * want.lse.abs().nan_to_num(posinf=0.0)
    assert not worst(lse, want.lse, lse_bound), f"lse: {worst(lse, want.lse, lse_bound)}"
    assert taken or not torch.isfinite(want.lse).any()


@settings(max_examples=200, deadline=None)
@given(case=cases, seed=st.integers(0, 9), splits=st.sampled_from([None, 2, 7]))
def test_matches_brute_force(case: LatentCase, seed: int, splits: int | None) -> None:
    check(make_inputs(case, seed=seed), splits)


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize(("batch", "heads", "queries"), [(1, 16, 1), (1, 40, 1), (3, 16, 2)])
def test_real_widths_by_threads(
    threads: int, batch: int, heads: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads than stretches of tokens share out rows, too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check(make_inputs(LatentCase(batch, heads, queries, 1501, 512, 64, torch.float32, causal=True, poison=True)))


@pytest.fixture(params=["", "-mavx2 -mfma", "-mavx"], ids=["narrow", "avx2", "avx"])
def narrower(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loop as a processor with narrower vectors has it."""
    if platform.machine() != "x86_64":
        pytest.skip("the flags are of x86; the vectors of this processor are tested above")
    source, built = Path(cpu_loop.__file__).with_suffix(".cpp"), tmp_path / "loop.so"
    flags = [*request.param.split(), "-O2", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([get_cpp_compiler(), *flags, source, "-o", built], check=True)
    monkeypatch.setattr(CppCodeCache, "load", lambda _: ctypes.CDLL(str(built)))
    cpu_loop.library.cache_clear()
    yield
    cpu_loop.library.cache_clear()


@pytest.mark.usefixtures("narrower")
def test_narrower_vectors() -> None:
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX to run it; the vectors that it has are tested above")
    check(make_inputs(LatentCase(2, 20, 2, 400, 96, 24, torch.float32, causal=True, poison=True)))


def test_reads_the_cache_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer holds latents and rotary keys: no copy of either."""
    inputs = make_inputs(LatentCase(2, 16, 1, 300, 64, 16, torch.float32, fused=True))
    called: list[tuple[Any, ...]] = []
    real = cpu_loop.library()

    class Spy:
        mla_decode_room = real.mla_decode_room  # type: ignore[union-attr]

        def mla_decode(self, *args: Any) -> None:
            called.append(args)
            real.mla_decode(*args)  # type: ignore[union-attr]

    monkeypatch.setattr(cpu_loop, "library", Spy)
    check(inputs)
    _, _, c_kv, k_pe, *_ = inputs.tensors
    assert called[0][2:4] == (c_kv.data_ptr(), k_pe.data_ptr())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.bfloat16}, "float32"),
        ({"mask": "bool"}, "mask"),
        ({"rank": 24}, "multiple of 16"),
    ],
)
def test_what_it_leaves_to_the_library(change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(replace(LatentCase(1, 4, 1, 30, 32, 8, torch.float32), **change))
    q_latent, _, _, _, mask, *_ = inputs.tensors
    assert q_latent is not None
    (reason,) = cpu_loop.loop_reasons(q_latent, mask, None)
    assert why in reason
    monkeypatch.setattr(cpu, "mla_decode_loop", None)
    cpu.mla_decode_cpu(*inputs.tensors, **inputs.keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", [2, 3], ids=["latents", "rotary keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["loop", "library"])
def test_values_of_a_token_that_lie_apart_are_copied(dtype: torch.dtype, which: int) -> None:
    inputs = make_inputs(LatentCase(2, 4, 1, 30, 32, 8, dtype, length=True))
    want = cpu.mla_decode_cpu(*inputs.tensors, **inputs.keywords)  # type: ignore[arg-type]
    apart: list[Any] = list(inputs.tensors)
    apart[which] = apart[which].mT.contiguous().mT
    torch.testing.assert_close(cpu.mla_decode_cpu(*apart, **inputs.keywords), want)


def test_without_a_compiler_the_library_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> None:
        raise RuntimeError("no compiler")

    inputs = make_inputs(LatentCase(1, 4, 1, 30, 32, 8, torch.float32))
    want = cpu.mla_decode_cpu(*inputs.tensors, **inputs.keywords)  # type: ignore[arg-type]
    monkeypatch.setattr(CppCodeCache, "load", fails)
    monkeypatch.setattr(cpu, "mla_decode_loop", None)
    cpu_loop.library.cache_clear()
    try:
        got = cpu.mla_decode_cpu(*inputs.tensors, **inputs.keywords)  # type: ignore[arg-type]
    finally:
        cpu_loop.library.cache_clear()
    torch.testing.assert_close(got, want)
