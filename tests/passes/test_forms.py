"""Which form a site takes, what is left of its mask, and that the graph which runs is the one that was chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import DynamicCache

from mlacompile import backend, compiler, last_report
from mlacompile.cost import border
from mlacompile.cost.hardware import TABLE, find_hardware
from mlacompile.kernels.mla_prefill import chunked
from mlacompile.lowering.cudagraphs import replayable
from mlacompile.testing.models import random_tokens, static_cache, tiny_model
from tests.spellings import Attention, Spelling

PREFILL, DECODE = torch.ops.mlacompile.mla_prefill.default, torch.ops.mlacompile.mla_decode.default
EAGER = {"rest": "eager", "kernel": "auto"}


class Cached(nn.Module):
    """Latent attention on a static cache whose position is a tensor, as in real models: causal, and padded on
    demand."""

    def __init__(self, spelling: Spelling, batch: int = 2, context: int = 64) -> None:
        super().__init__()
        self.attend = Attention(spelling, batch, context)
        self.context = context
        self.register_buffer("latents", torch.zeros(batch, context, spelling.rank), persistent=False)
        self.register_buffer("rotary", torch.zeros(batch, context, spelling.pe), persistent=False)

    def forward(self, x: Tensor, position: Tensor, keep: Tensor | None = None) -> Tensor:
        inner, s = self.attend, self.attend.s
        b, n, _ = x.shape
        q = inner.q_proj(x).view(b, n, s.heads, s.nope + s.pe)
        c, pe = inner.down(x).split([s.rank, s.pe], -1)
        at = torch.arange(n) + position
        self.latents.index_copy_(1, at, inner.norm(c))
        self.rotary.index_copy_(1, at, pe)
        mask = torch.arange(self.context) <= at[:, None]
        mask = mask if keep is None else mask & keep[:, None, None]
        k_nope, v = inner.expand(self.latents)
        k = torch.cat((k_nope, self.rotary[:, :, None].expand(-1, -1, s.heads, -1)), -1)
        return inner.out(inner.attend(q, k, v, mask.expand(b, 1, -1, -1)).reshape(b, n, -1))


SPELLING = Spelling(heads=3, rank=16, nope=8, rope_width=4, v=8, hidden=24)


def module(**changes: Any) -> Cached:
    torch.manual_seed(0)
    found = Cached(Spelling(**(SPELLING.__dict__ | changes))).eval().requires_grad_(False)
    found.latents.fill_(torch.nan)  # what is not written must not be read
    found.rotary.fill_(torch.nan)
    return found


@dataclass
class Run:
    """A module compiled with options, its report, and the graph that was left for the rest."""

    graphs: list[GraphModule]
    run: Callable[..., Tensor]

    def calls(self, op: Any) -> list[Any]:
        return list(self.graphs[-1].graph.find_nodes(op="call_function", target=op))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: Any, *rest: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(compiler, "compile_rest", keep)

    def compile_module(model: nn.Module, **options: Any) -> Run:
        return Run(graphs, torch.compile(model, backend=backend, options=EAGER | options))

    return compile_module


def same(model: Cached, run: Run, *inputs: Any) -> None:
    """The compiled module and the eager one agree on a cache of zeros, where the eager one can be run."""
    with torch.no_grad():
        got = run.run(*inputs)
        for cache in (model.latents, model.rotary):
            cache.nan_to_num_(0.0)
        want = model(*inputs)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize("queries", [2, 8])
def test_a_few_queries_need_no_mask(compiled: Callable[..., Run], attention: str, queries: int) -> None:
    model = module(attention=attention)
    run = compiled(model, form="absorbed")
    same(model, run, torch.randn(2, queries, 24), torch.tensor(0))
    (decode,) = run.calls(DECODE)
    mask, start, length = decode.args[4:7]
    assert (mask, start, decode.kwargs["causal"]) == (None, None, True)
    assert length is not None
    assert last_report().sites[0].sees == "causal"


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_a_prompt_is_a_square_of_its_own_length(
    compiled: Callable[..., Run], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attend = chunked.attend

    def spy(q: Tensor, k: Tensor, v: Tensor, visible: Any, added: Any, **rest: Any) -> Any:
        seen.append((q.shape[2], k.shape[2], visible, rest["causal"]))
        return attend(q, k, v, visible, added, **rest)

    monkeypatch.setattr(chunked, "attend", spy)
    model = module(attention=attention)
    run = compiled(model, form="expanded")
    same(model, run, torch.randn(2, 40, 24), torch.tensor(0))
    (prefill,) = run.calls(PREFILL)
    assert prefill.args[5] is None, "no mask"
    assert seen == [(40, 40, None, True)], "64 tokens fit; none but the 40 written ones is expanded"
    (site,) = last_report().sites
    assert (site.status, site.form, site.kernel, site.sees) == ("expanded", "chunked", "chunked", "causal")
    seen.clear()
    same(model, run, torch.randn(2, 20, 24), torch.tensor(40))
    assert seen == [(20, 40, None, False), (20, 20, None, True)], "a cached prefix, then a square"


def test_no_cuda_graph_is_recorded_around_a_prompt(compiled: Callable[..., Run]) -> None:
    for form, queries, recorded in (("expanded", 40, False), ("absorbed", 1, True)):
        torch._dynamo.reset()
        run = compiled(module(), form=form)
        run.run(torch.randn(2, queries, 24), torch.tensor(0))
        assert replayable(run.graphs[-1]) is recorded


def test_a_prompt_through_inductor() -> None:
    model = module()
    run = torch.compile(model, backend=backend, options={"form": "expanded"})
    for queries in (40, 33, 20):  # of which the first is compiled for all: left to itself, Dynamo compiles twice
        x = torch.randn(2, queries, 24)
        torch._dynamo.mark_dynamic(x, 1)
        same(model, Run([], run), x, torch.tensor(0))
    assert last_report().sites[0].form == "chunked"


def test_a_padded_prompt_keeps_a_mask_of_tokens(compiled: Callable[..., Run]) -> None:
    model = module()
    keep = torch.ones(2, 64, dtype=torch.bool)
    keep[0, :3] = False
    run = compiled(model, form="expanded")
    x = torch.randn(2, 20, 24)
    with torch.no_grad():
        got = run.run(x, torch.tensor(0), keep)
        for cache in (model.latents, model.rotary):
            cache.nan_to_num_(0.0)
        want = model(x, torch.tensor(0), keep)
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[0, 3:], want[0, 3:])
    (prefill,) = run.calls(PREFILL)
    assert prefill.args[5].meta["val"].shape == (2, 1, 64)
    assert last_report().sites[0].sees == "causal, padding"


def test_auto_follows_the_border(compiled: Callable[..., Run], slow_hardware: str) -> None:
    """The rates are those of a named device, so that the border is the same on every machine."""
    geometry = last_geometry()
    limit = border(geometry, 2, 64, "float32", find_hardware(None, slow_hardware), "chunked")
    assert 1 < limit < 63
    for queries, status in ((limit, "absorbed"), (limit + 1, "expanded")):
        torch._dynamo.reset()
        model = module()
        run = compiled(model, hardware=slow_hardware)
        same(model, run, torch.randn(2, queries, 24), torch.tensor(0))
        (site,) = last_report().sites
        assert site.status == status
        assert f"up to {limit} queries on a slow one" in site.reason
        assert len(run.calls(DECODE)) == (status == "absorbed")
        assert site.seconds is not None
        assert all(site.seconds <= other for _, other in site.instead), "the cheaper one was predicted to be cheaper"


def last_geometry() -> Any:
    from mlacompile import MLAGeometry

    return MLAGeometry(SPELLING.heads, SPELLING.rank, SPELLING.nope, SPELLING.pe, SPELLING.v)


def test_a_varying_number_of_queries_is_compiled_for_once_and_picks(
    compiled: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, slow_hardware: str
) -> None:
    absorbed = []
    honest = chunked._absorbed
    monkeypatch.setattr(
        chunked, "_absorbed", lambda call, *rest: [absorbed.append(call.q.shape[2]), honest(call, *rest)][1]
    )
    model = module()
    run = compiled(model, hardware=slow_hardware)
    limit = border(last_geometry(), 2, 64, "float32", find_hardware(None, slow_hardware), "chunked")
    lengths = (3, 5, limit, limit + 1, 2, 60)
    for queries in lengths:
        same(model, run, torch.randn(2, queries, 24), torch.tensor(0))
    (site,) = last_report().sites
    assert site.form == "by length"
    assert len(run.graphs) == 2, "one for the first number, one for all others"
    assert absorbed == [n for n in lengths[1:] if n <= limit]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_first_prompt_on_a_growing_cache_loses_its_mask(compiled: Callable[..., Run], attn: str) -> None:
    model: Any = tiny_model("minicpm3", attn=attn, num_hidden_layers=1)
    tokens = random_tokens(model.config, 2, 30)
    run = compiled(model, form="expanded")
    with torch.no_grad():
        got = run.run(input_ids=tokens, past_key_values=DynamicCache(config=model.config)).logits  # type: ignore[attr-defined]
        want = model(input_ids=tokens, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(got, want)
    (site,) = last_report().sites
    assert (site.form, site.sees) == ("expanded", "causal")
    if attn == "eager":
        (attend,) = run.calls(torch.ops.aten.scaled_dot_product_attention.default)
        assert attend.args[3] is None
        assert attend.args[5] is True


def test_a_real_model_reads_a_prompt_in_parts(compiled: Callable[..., Run], slow_hardware: str) -> None:
    """A prompt, then more of it on what is cached, then single tokens; every length is compiled once and agrees."""
    model: Any = tiny_model("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=1)
    tokens = random_tokens(model.config, 2, 60)
    attend = torch.ones(2, 64, dtype=torch.long)
    attend[0, :5] = 0
    run = compiled(model, hardware=slow_hardware)
    pasts = static_cache(model, 2, 64), static_cache(model, 2, 64)
    with torch.no_grad():
        for start, stop in ((0, 40), (40, 58), (58, 59), (59, 60)):
            got, want = (
                each(input_ids=tokens[:, start:stop], attention_mask=attend, past_key_values=past).logits
                for each, past in zip((run.run, model), pasts, strict=True)
            )
            got, want = got[:, 5 if start == 0 else 0 :], want[:, 5 if start == 0 else 0 :]
            assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_choosing_a_form_takes_milliseconds() -> None:
    """A warm choice, as for all layers of a model but the first."""
    import time

    from mlacompile.geometry import MLAGeometry

    geometry = MLAGeometry(128, 512, 128, 64, 128)
    border(geometry, 1, 1000, "bfloat16", TABLE["h200"])
    begin = time.process_time()
    for context in range(2000, 2010):
        border(geometry, 1, context, "bfloat16", TABLE["h200"])
    assert (time.process_time() - begin) / 10 < 0.02
