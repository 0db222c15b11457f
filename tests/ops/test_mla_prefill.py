"""``mla_prefill`` against float64 by brute force, whatever is hidden, however it is cut; and what it keeps in
memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mlacompile.ops.visible_bounds  # noqa: F401  (registers the op)
from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels.mla_prefill import attend as attend_module
from mlacompile.kernels.mla_prefill.attend import attend
from mlacompile.kernels.mla_prefill.chunked import mla_prefill_chunked
from mlacompile.ops import mla_decode_reference, mla_prefill_reference


@dataclass(frozen=True)
class Case:
    """Sizes, and what is hidden from whom."""

    batch: int = 2
    heads: int = 3
    queries: int = 5
    tokens: int = 19
    rank: int = 8
    nope: int = 6
    rope: int = 4
    v: int = 5
    chunk: int = 4
    mask: str = ""  # "", tokens, pairs, added
    start: bool = False
    length: bool = False
    alike: bool = True  # all rows of a batch as long as each other
    causal: bool = True
    rope_first: bool = False
    gap: int = 0  # rows of q that meet nothing
    dtype: torch.dtype = torch.float32


def inputs(case: Case, seed: int = 0) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Arguments of the op, with NaN in every cached row that no query of its batch row sees."""
    gen = torch.Generator().manual_seed(seed)
    b, h, s, t = case.batch, case.heads, case.queries, case.tokens

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen).to(case.dtype)

    def rows(low: int, high: int) -> Tensor:
        found = torch.randint(low, high + 1, (1 if case.alike else b,), generator=gen, dtype=torch.int32)
        return found.expand(b).contiguous()

    q = randn(b, s, h, case.nope + case.rope + case.gap).transpose(1, 2)
    c_kv, k_pe = randn(b, t, case.rank), randn(b, t, case.rope) if case.rope else None
    up = randn(h, case.nope + case.v, case.rank)
    start = rows(0, t // 2) if case.start else None
    length = rows(0, t + 2) if case.length else None
    mask = None
    if case.mask:
        mask = torch.rand((b, 1 if case.mask == "tokens" else s, t), generator=gen) < 0.6
        if case.mask == "added":
            mask = torch.where(mask, torch.randn(b, s, t, generator=gen), -math.inf).to(case.dtype)
    settings = {"scale": 0.3, "causal": case.causal, "chunk": case.chunk}
    settings |= {"nope_at": case.rope if case.rope_first else 0, "pe_at": 0 if case.rope_first else case.nope}
    tensors = [q, c_kv, k_pe, up[:, : case.nope], up[:, case.nope :], mask, start, length]
    seen = visible(tensors, case).any(1)
    for i, cache in enumerate((c_kv, k_pe)):
        if cache is not None:
            cache[~seen] = (math.nan, math.inf)[i]
    return tensors, settings


def visible(tensors: list[Any], case: Case) -> Tensor:
    """Bool ``[B, S, T]``, straight from the wording of the contract."""
    *_, mask, start, length = tensors
    b, s, t = case.batch, case.queries, case.tokens
    token, query = torch.arange(t), torch.arange(s)[:, None]
    end = torch.full((b,), t) if length is None else length.long()
    seen = (token < end[:, None, None]).expand(b, s, t).clone()
    if start is not None:
        seen &= token >= start[:, None, None]
    if case.causal:
        seen &= token <= end[:, None, None] - s + query
    if mask is not None:
        seen &= mask if mask.dtype is torch.bool else mask != -math.inf
    return seen


def brute_force(tensors: list[Any], settings: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    """Keys and values of every head written out, in float64."""
    q, c_kv, k_pe, w_uk, w_uv, mask, *_ = (x if x is None or x.dtype is torch.bool else x.double() for x in tensors)
    seen = visible(tensors, case)
    c_kv = torch.where(seen.any(1)[..., None], c_kv, 0.0)
    k = torch.zeros(case.batch, case.heads, case.tokens, q.shape[3], dtype=torch.float64)
    k[..., settings["nope_at"] : settings["nope_at"] + case.nope] = torch.einsum("btr,hnr->bhtn", c_kv, w_uk)
    if k_pe is not None:
        rotary = torch.where(seen.any(1)[..., None], k_pe, 0.0)
        k[..., settings["pe_at"] : settings["pe_at"] + case.rope] = rotary[:, None]
    scores = q @ k.transpose(2, 3) * settings["scale"]
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores + mask[:, None]
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    return p @ torch.einsum("btr,hvr->bhtv", c_kv, w_uv), lse


def check(run: Any, case: Case, seed: int = 0, **more: Any) -> None:
    tensors, settings = inputs(case, seed)
    out, lse = run(*tensors, **settings, **more)
    want, want_lse = brute_force(tensors, settings, case)
    unit = torch.finfo(case.dtype).eps
    # Sums of rank + nope + tokens products, each rounded, twice over; inputs are of order one.
    bound = 8 * unit * (case.rank + case.nope + case.rope + case.tokens) * max(float(want.abs().max()), 1.0)
    assert out.dtype == case.dtype
    assert float((out.double() - want).abs().max()) <= bound, case
    assert torch.equal(lse == -math.inf, want_lse == -math.inf), case
    seen = want_lse != -math.inf
    bound *= torch.finfo(lse.dtype).eps / unit if lse.dtype.itemsize < case.dtype.itemsize else 1.0
    assert not seen.any() or float((lse.double() - want_lse)[seen].abs().max()) <= bound, case


CASES = st.builds(
    Case,
    *(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 19), st.integers(1, 9)),
    *(st.integers(1, 6), st.sampled_from([0, 4]), st.integers(1, 9), st.integers(1, 21)),
    *(
        st.sampled_from(["", "", "tokens", "pairs", "added"]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    *(st.booleans(), st.sampled_from([0, 2])),
)


@given(CASES, st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_the_reference_is_the_definition(case: Case, seed: int) -> None:
    check(mla_prefill_reference, case, seed)


@given(CASES, st.integers(0, 99))
@settings(max_examples=250, deadline=None)
def test_the_chunked_kernel_agrees(case: Case, seed: int) -> None:
    check(mla_prefill_chunked, case, seed)


@given(CASES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_few_queries_are_attended_on_the_latent(case: Case, seed: int) -> None:
    check(mla_prefill_chunked, case, seed, absorb_up_to=case.queries)


@given(CASES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_rows_may_be_too_many_to_expand_together(case: Case, seed: int) -> None:
    from mlacompile.kernels.mla_prefill import chunked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_rows_at_once", lambda call: 1)
        check(mla_prefill_chunked, case, seed)


@given(CASES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_it_is_right_when_nothing_can_be_read(case: Case, seed: int) -> None:
    """As while a CUDA graph is captured."""
    from mlacompile.kernels.mla_prefill import chunked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_windows", lambda *args: None)
        check(mla_prefill_chunked, case, seed)


@given(CASES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_bounds_that_were_read_before_change_nothing(case: Case, seed: int) -> None:
    tensors, settings = inputs(case, seed)
    if any(x is not None for x in tensors[5:]):
        bounds = torch.ops.mlacompile.visible_bounds(*tensors[5:], case.batch, case.tokens)
        for got, want in zip(
            mla_prefill_chunked(*tensors, **settings, bounds=bounds),
            mla_prefill_chunked(*tensors, **settings),
            strict=True,
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mask", ["", "pairs", "added"])
def test_other_dtypes(dtype: torch.dtype, mask: str) -> None:
    case = Case(dtype=dtype, length=True, mask=mask)
    for run in (mla_prefill_reference, mla_prefill_chunked):
        check(run, case)


def test_a_first_prompt_on_a_long_cache_is_one_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 tokens fit, 9 are written, 9 ask: attention runs once, causal, on 9 keys, and nothing else is expanded."""
    from mlacompile.kernels.mla_prefill import chunked

    calls = []

    def spy(q: Tensor, k: Tensor, v: Tensor, visible: Any, added: Any, **rest: Any) -> Any:
        calls.append((q.shape[2], k.shape[2], visible, rest["causal"]))
        return attend(q, k, v, visible, added, **rest)

    monkeypatch.setattr(chunked, "attend", spy)
    case = Case(queries=9, tokens=40, chunk=16)
    tensors, settings = inputs(case)
    tensors[-1] = torch.full((2,), 9, dtype=torch.int32)
    mla_prefill_chunked(*tensors, **settings)
    assert calls == [(9, 9, None, True)]
    calls.clear()
    tensors[-1] = torch.full((2,), 36, dtype=torch.int32)
    mla_prefill_chunked(*tensors, **settings)
    assert calls == [(9, 16, None, False), (9, 11, None, False), (9, 9, None, True)]
    calls.clear()
    tensors[-1], tensors[-3] = torch.full((2,), 9, dtype=torch.int32), torch.arange(40).expand(2, 1, 40) >= 3
    out, _ = mla_prefill_chunked(*tensors, **settings)
    assert calls == [(6, 6, None, True)], "left padding is cut off, not masked"
    assert (out[:, :, :3] == 0).all()


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that ops made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("queries", [2, 64, 256])
def test_memory_stays_below_twice_the_cache_and_one_expanded_chunk(queries: int) -> None:
    g = {"heads": 16, "rank": 64, "nope": 32, "rope": 16, "v": 32}
    case = Case(batch=1, queries=queries, tokens=4096, chunk=512, length=True, **g)  # type: ignore[arg-type]
    tensors, settings = inputs(case)
    tensors[-1] = torch.full((1,), 4000, dtype=torch.int32)
    with Peak() as peak:
        mla_prefill_chunked(*tensors, **settings)
    cache = 4 * 4096 * (64 + 16)
    expanded = 4 * 512 * 16 * (32 + 16 + 32)
    assert peak.peak < 2 * (cache + expanded)
    whole = 4 * 4000 * 16 * (32 + 16 + 32)
    assert peak.peak < whole / 2, "the whole cache is never expanded"


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_the_op_runs_whatever_it_is_told_to(impl: str) -> None:
    case = Case(length=True, mask="tokens")
    check(lambda *args, **kwargs: torch.ops.mlacompile.mla_prefill(*args, **kwargs, impl=impl), case)


def test_the_op_passes_opcheck() -> None:
    tensors, settings = inputs(Case(length=True, start=True, rope_first=True))
    tensors[1], tensors[2] = (x.nan_to_num(0.0, 0.0, 0.0) for x in tensors[1:3])  # type: ignore[union-attr]
    torch.library.opcheck(torch.ops.mlacompile.mla_prefill.default, tuple(tensors), settings)


def test_reading_bounds_passes_opcheck() -> None:
    tensors, _ = inputs(Case(length=True, start=True, mask="tokens"))
    torch.library.opcheck(torch.ops.mlacompile.visible_bounds.default, (*tensors[5:], 2, 19))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({0: torch.zeros(2, 3, 5)}, r"expected \[B, H, S, D\]"),
        ({3: torch.zeros(3, 6, 9)}, r"got w_uk \[3, 6, 9\]; expected 3 heads and rank 8"),
        ({4: torch.zeros(2, 5, 8)}, r"got w_uv \[2, 5, 8\]; expected 3 heads"),
        ({2: torch.zeros(2, 19, 99)}, r"the rope rows of q end at 105, q has 10"),
    ],
)
def test_bad_shapes_say_what_is_wrong(change: dict[int, Tensor], expected: str) -> None:
    tensors, settings = inputs(Case())
    for i, x in change.items():
        tensors[i] = x
    with pytest.raises(UnsupportedInputError, match=expected):
        torch.ops.mlacompile.mla_prefill(*tensors, **settings)


def test_plain_products_serve_where_no_kernel_does() -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 6)
    want = attend(q, k, v, None, None, causal=True, scale=0.2)
    got = attend_module._plain(q, k, v, None, True, 0.2)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_chunked_attention_is_the_absorbed_one() -> None:
    """Two ops, one definition of what a query sees."""
    case = Case(length=True, start=True, mask="tokens")
    tensors, settings = inputs(case)
    q, c_kv, k_pe, w_uk, w_uv, *seen = tensors
    assert q is not None and k_pe is not None  # noqa: PT018
    q_latent = torch.einsum("bhsn,hnr->bhsr", q[..., : case.nope], w_uk)
    out, lse = mla_decode_reference(q_latent, q[..., case.nope :], c_kv, k_pe, *seen, scale=0.3, causal=True)  # type: ignore[arg-type]
    got, got_lse = mla_prefill_chunked(*tensors, **settings)
    torch.testing.assert_close(got, torch.einsum("bhsr,hvr->bhsv", out, w_uv))
    torch.testing.assert_close(got_lse, lse)
