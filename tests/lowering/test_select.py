"""Where no kernel takes a call, its reference stands in the graph; not where Inductor could not compile that."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import mlacompile.ops  # noqa: F401
from mlacompile.lowering import select
from mlacompile.ops import mla_decode_reference

OP = torch.ops.mlacompile.mla_decode.default


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_the_reference_of_an_fp8_cache_is_traced_only_where_it_compiles(
    fp8: bool, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, cache = torch.randn(1, 2, 1, 32), torch.randn(1, 8, 32)
    descale = torch.rand(1, 8, 1) if fp8 else None
    stored = cache.to(torch.float8_e4m3fn) if fp8 else cache

    def model(q: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return OP(q, None, stored, None, None, None, None, None, descale, scale=0.1)[0]

    gm = make_fx(model)(q, stored)
    (node,) = select.decode_nodes(gm)
    monkeypatch.setattr(select, "compiles_fp8", lambda x: compiles)
    want = gm(q, stored)
    select.place_kernels(gm, {node: "inductor"})
    left = fp8 and not compiles
    assert node.target is (OP if left else mla_decode_reference)
    assert node.kwargs.get("impl") == ("reference" if left else None)
    torch.testing.assert_close(gm(q, stored), want)


def test_a_cache_is_read_as_stored_where_a_kernel_takes_it() -> None:
    q, stored, descale = torch.randn(1, 2, 1, 32), torch.zeros(1, 8, 32).to(torch.float8_e4m3fn), torch.rand(1, 8, 1)
    arguments = (q, None, stored, None, None, None, None, None, descale)
    assert select.reads_fp8("auto", *arguments, scale=0.1)
    assert select.reads_fp8("reference", *arguments, scale=0.1)
    assert not select.reads_fp8("gluon", *arguments, scale=0.1), "dequantized, Inductor takes it as before"
    paged = (*arguments[:7], torch.zeros(1, 1, dtype=torch.int32), descale)
    assert not select.reads_fp8("auto", *paged, scale=0.1), "no CPU kernel reads pages"
