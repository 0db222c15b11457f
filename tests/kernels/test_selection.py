"""Which kernel serves a call on Hopper: what the measurements in docs/kernels.md say, and what a kernel cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlacompile.kernels import registry
from mlacompile.kernels.mla_decode import supports
from mlacompile.kernels.mla_decode.plan import OVERHEAD, WIDE_OVERHEAD, Device


@pytest.fixture(autouse=True)
def _a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are asked about meta tensors as if those lay on an H100."""
    monkeypatch.setattr(supports, "device_reasons", lambda device: [])
    monkeypatch.setattr(supports, "hopper_device_reasons", lambda device: [])
    monkeypatch.setattr(supports, "_fp8_reasons", lambda *args: [])


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def call(
    heads: int, batch: int, tokens: int, *, page: int = 0, fp8: int = 0, queries: int = 1
) -> tuple[Tensor | None, ...]:
    """Queries, cache, bounds, pages and factors of a call without a mask.

    fp8: factors a token, 0 for a cache in 16 bits; with more than one a token is a run of 656 bytes.
    """
    units = (batch * tokens // page, page) if page else (batch, tokens)
    table = meta(batch, tokens // page, dtype=torch.int32) if page else None
    c_kv, k_pe, descale = meta(*units, 512), meta(*units, 64), None
    if fp8 == 1:
        c_kv, descale = meta(*units, 512, dtype=torch.float8_e4m3fn), meta(*units, 1, dtype=torch.float32)
    elif fp8:
        run = meta(*units, 656, dtype=torch.uint8)
        c_kv = run[..., :512].view(torch.float8_e4m3fn)
        descale, k_pe = run[..., 512:528].view(torch.float32), run[..., 528:].view(torch.bfloat16)
    q_latent, q_pe = meta(batch, heads, queries, 512), meta(batch, heads, queries, 64)
    return q_latent, q_pe, c_kv, k_pe, None, None, table, descale


def chosen(
    heads: int, batch: int, tokens: int, *, page: int = 0, fp8: int = 0, mask: bool = False
) -> tuple[str | None, dict[str, list[str]]]:
    tensors = call(heads, batch, tokens, page=page, fp8=fp8)
    masked = meta(batch, 1, tokens, dtype=torch.bool) if mask else None
    best, passed = registry.best("mla_decode", *tensors[:4], masked, *tensors[4:], scale=0.1, causal=False)
    return None if best is None else best.name, passed


@pytest.mark.parametrize(
    ("kernel", "heads", "batch", "tokens", "page"),
    [
        ("gluon", 128, 128, 8192, 0),
        ("gluon", 64, 128, 8192, 64),
        ("gluon", 128, 1, 8192, 0),
        ("gluon", 16, 1, 8192, 64),
        ("gluon", 16, 64, 8192, 64),
        ("triton", 16, 128, 8192, 0),
        ("triton", 16, 64, 8192, 0),
        ("gluon", 16, 16, 8192, 0),
        ("gluon", 20, 64, 8192, 0),
        ("triton", 16, 1, 1024, 0),
        ("triton", 64, 1, 1024, 64),
        ("gluon", 16, 1, 8192, 0),
        ("gluon", 128, 1, 1024, 64),
    ],
)
def test_sixteen_bits(kernel: str, heads: int, batch: int, tokens: int, page: int) -> None:
    assert chosen(heads, batch, tokens, page=page)[0] == kernel


@pytest.mark.parametrize("fp8", [1, 4])
@pytest.mark.parametrize(("heads", "batch", "page"), [(128, 128, 0), (16, 128, 64), (16, 1, 0), (128, 1, 64)])
def test_fp8_caches(fp8: int, heads: int, batch: int, page: int) -> None:
    assert chosen(heads, batch, 8192, page=page, fp8=fp8)[0] == "gluon"


def test_what_the_hopper_kernel_cannot_take_goes_to_the_next_with_the_reason() -> None:
    name, passed = chosen(128, 2, 1024, mask=True)
    assert name == "triton"
    assert "there is a mask" in passed["gluon"]
    name, passed = chosen(128, 2, 1024, page=16, fp8=1)
    assert name == "triton"
    assert "pages have 16 tokens" in "; ".join(passed["gluon"])
    name, passed = chosen(128, 2, 65, fp8=1)
    assert name == "triton"
    assert "TMA copies from multiples of 16 bytes" in "; ".join(passed["gluon"])


@pytest.mark.parametrize(
    ("tile_rows", "heads", "queries", "batch", "tokens", "page", "fp8", "apart"),
    [
        (32, 16, 1, 1, 8192, 0, 1, False),
        (32, 16, 2, 64, 8192, 64, 1, False),
        (64, 128, 1, 16, 8192, 64, 1, False),
        (32, 128, 1, 1, 8192, 64, 1, False),
        (64, 128, 1, 1, 32768, 64, 1, False),
        (64, 128, 1, 64, 8192, 64, 1, True),
        (64, 64, 1, 128, 8192, 64, 1, True),
        (64, 128, 1, 128, 4096, 64, 1, False),
        (32, 16, 4, 1, 8192, 0, 1, False),
        (32, 16, 1, 1, 8192, 0, 4, False),
        (32, 16, 1, 64, 8192, 64, 4, False),
        (32, 16, 2, 128, 8192, 64, 4, False),
        (32, 128, 1, 1, 8192, 64, 4, False),
        (64, 33, 1, 64, 8192, 64, 4, True),
        (64, 16, 4, 64, 8192, 0, 4, True),
        (64, 128, 1, 128, 4096, 64, 4, True),
        (0, 16, 1, 64, 8192, 64, 0, False),
    ],
)
def test_fp8_products_are_chosen(
    tile_rows: int, heads: int, queries: int, batch: int, tokens: int, page: int, fp8: int, apart: bool
) -> None:
    """In wide or narrow tiles by what a batch can hold. With keys on the left by what a program can, and wherever a
    token has several factors."""
    pytest.importorskip("triton", reason="tiles are described to Triton")
    from mlacompile.kernels.mla_decode.hopper_launch import choose_hopper_plan

    plan = choose_hopper_plan(call(heads, batch, tokens, queries=queries, page=page, fp8=fp8), Device())
    assert (plan.tile_rows if plan.turned else 0) == tile_rows
    assert plan.overhead == (WIDE_OVERHEAD if tile_rows == 64 else OVERHEAD)
    assert plan.apart is apart


def test_fp8_products_take_pairs_of_columns_in_e4m3() -> None:
    def reasons(rank: int, dtype: torch.dtype) -> str:
        return "; ".join(supports.turned_reasons(meta(2, 64, rank, dtype=dtype)))

    assert not reasons(512, torch.float8_e4m3fn)
    assert "columns in pairs" in reasons(511, torch.float8_e4m3fn)
    assert "e5m2" in reasons(512, torch.float8_e5m2)
