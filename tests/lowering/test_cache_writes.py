"""Whole decode steps that norm, rotate and store in one launch a layer, with the reference for the kernel; and what is
left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import mlacompile
import mlacompile.compiler as compiler
from mlacompile import LatentCache
from mlacompile.lowering.cache_writes import place_cache_writes
from mlacompile.lowering.region import fed_by_tokens
from mlacompile.lowering.rotation import pairs_of, rotation_before
from mlacompile.ops import mla_decode, write_latents_reference
from mlacompile.testing import models
from tests.lowering.rewritten import willing

WRITE_LATENTS = torch.ops.mlacompile.write_latents.default
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes everything, on the CPU."""
    willing(monkeypatch, {"write_latents": write_latents_reference}, name="triton")


def _graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    graphs: list[GraphModule] = []
    lowered = compiler.compile_rest
    monkeypatch.setattr(compiler, "compile_rest", lambda gm, *more: graphs.append(gm) or lowered(gm, *more))
    return graphs


def _calls(gm: GraphModule) -> list[torch.fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=WRITE_LATENTS))


CASES: list[tuple[str, dict[str, Any] | None, int, int, str]] = [
    ("deepseek_v3", None, 1, 1, "interleaved to halves"),
    ("deepseek_v2", None, 2, 1, "interleaved"),
    ("minicpm3", None, 1, 1, "halves"),
    ("deepseek_v2", None, 1, 4, "interleaved"),
    ("deepseek_v3", {}, 2, 3, "interleaved to halves"),
    ("deepseek_v3", {"dtype": "fp8_e4m3"}, 1, 1, "interleaved to halves"),
    ("minicpm3", {"dtype": "fp8_e5m2", "scales": "token", "rope_dtype": "fp16"}, 2, 1, "halves"),
]


@pytest.mark.parametrize(("family", "kind", "batch", "width", "pairs"), CASES)
def test_twenty_tokens(
    family: str, kind: dict[str, Any] | None, batch: int, width: int, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = _graphs(monkeypatch)
    sizes = {"num_hidden_layers": 2} | ({} if family == "minicpm3" else {"first_k_dense_replace": 2})
    model = models.tiny_model(family, **sizes)
    caches = [_cache(model, kind, batch) for _ in range(2)]
    compiled = torch.compile(model.forward, backend="mlacompile", options={"rest": "eager"}, fullgraph=True)
    for i in range(20 // width):
        tokens = models.random_tokens(model.config, batch, width, seed=i)
        with torch.no_grad():
            want, got = (
                run(input_ids=tokens, past_key_values=cache).logits
                for run, cache in zip((model.forward, compiled), caches, strict=True)
            )
        # FP8 rounds what differs in the last bit of float32 to neighbours now and then.
        allowed = (1e-5 if not kind else 1e-2) * float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=allowed)
    calls = _calls(graphs[0])
    assert len(graphs) == 1
    assert len(calls) == 2
    assert "2 layers norm, rotate and store" in " ".join(mlacompile.last_report().notes)
    for call in calls:
        latent, k_pe, q_pe, norm, rotation = call.args[:5]
        assert None not in (latent, k_pe, q_pe, norm, rotation)
        assert call.kwargs["pairs"] == pairs
        assert call.kwargs["eps"] > 0
    assert calls[0].args[4] is calls[1].args[4], "factors are computed once for all layers"
    decodes = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.mlacompile.mla_decode.default)
    assert len({d.args[6] for d in decodes}) == 1, "as is how much of the cache is seen"
    left = {n.target for n in graphs[0].graph.nodes}
    assert aten.index_copy.default not in left
    assert torch.ops.mlacompile.fp8_quantize.default not in left
    for layers in zip(*(_arrays(cache) for cache in caches), strict=True):
        for one, other in zip(*layers, strict=True):
            if one.dtype == torch.float32:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            else:  # bytes: nearly all the same, for a value may lie on the border of two
                assert float((one != other).float().mean()) < 0.02


def _cache(model: Any, kind: dict[str, Any] | None, batch: int) -> Any:
    if kind is None:
        return models.static_cache(model, batch, 32, length=7, random=True)
    cache = LatentCache(model.config, max_cache_len=32, **kind)
    with torch.no_grad():
        model(input_ids=models.random_tokens(model.config, batch, 7), past_key_values=cache)
    return cache


def _arrays(cache: Any) -> list[list[Tensor]]:
    if isinstance(cache, LatentCache):
        return [list(layer.store.arrays().values()) for layer in cache.layers]
    return [[layer.keys, layer.values] for layer in cache.layers]


def _step(
    x: Tensor, down: Tensor, g: Tensor, q_latent: Tensor, q_up: Tensor, c_cache: Tensor, k_cache: Tensor,
    slots: Tensor, cos: Tensor, sin: Tensor,
    rotate: Callable[..., Tensor], rotate_q: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """One layer's attention in the least ops, with its cache written at the end as functionalization leaves it."""
    c, k = (x @ down).split([32, 8], dim=-1)
    wide = c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * g
    q = (x @ q_up).view(1, 1, 4, 8).transpose(1, 2)
    rows = aten.index_copy.default(c_cache, 1, slots, wide)
    keys = aten.index_copy.default(k_cache, 1, slots, rotate(k, cos, sin))
    out, _ = mla_decode(q_latent, rotate_q(q, cos, sin), rows, keys, None, None, None, scale=0.1)
    aten.copy_.default(c_cache, rows)
    aten.copy_.default(k_cache, keys)
    return out


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


def _squared(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _halves(x * x, cos, sin)


def _backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _halves(x, cos, -sin)


def _swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """No rotation of pairs: what is left and right changes places with what is not its partner."""
    return _halves(x.flip(-1), cos, sin)


SHAPES = [(1, 1, 16), (16, 40), (32,), (1, 4, 1, 32), (16, 32), (1, 9, 32), (1, 9, 8), (1,), (1, 1, 4), (1, 1, 4)]


def _traced(rotate: Callable[..., Tensor], rotate_q: Callable[..., Tensor], step: Any = _step) -> GraphModule:
    with FakeTensorMode():
        inputs = [torch.empty(s, dtype=torch.int64 if s == (1,) else torch.float32) for s in SHAPES]
        gm = make_fx(lambda *args: step(*args, rotate, rotate_q))(*inputs)
    gm.graph = fx_graph_cse(gm.graph)  # as the pipeline does
    return gm


def _same(gm: GraphModule, before: GraphModule) -> None:
    """Two graphs that return and write the same."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.tensor([3]) if s == (1,) else torch.randn(s, generator=generator).contiguous() for s in SHAPES]
    copies = [x.clone() for x in inputs]
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), before(*copies))
    torch.testing.assert_close(inputs, copies)


def test_one_layer_is_one_call() -> None:
    gm, before = _traced(_halves, _halves), _traced(_halves, _halves)
    assert place_cache_writes(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    (call,) = _calls(gm)
    assert call.args[2] is not None
    _same(gm, before)


@pytest.mark.parametrize("rotate_q", [_backwards, _squared, _swapped])
def test_queries_turned_otherwise_stay(rotate_q: Callable[..., Tensor]) -> None:
    gm, before = _traced(_halves, rotate_q), _traced(_halves, rotate_q)
    assert place_cache_writes(gm) == 1
    gm.graph.eliminate_dead_code()
    (call,) = _calls(gm)
    assert call.args[2] is None
    _same(gm, before)


@pytest.mark.parametrize("rotate", [_squared, _swapped])
def test_keys_that_are_not_rotated_stay(rotate: Callable[..., Tensor]) -> None:
    gm = _traced(rotate, _halves)
    assert place_cache_writes(gm) == 0
    assert not _calls(gm)


def _read_before(*args: Any) -> Tensor:
    """The old rows are needed: writing where they lie would lose them."""
    return _step(*args) + args[5].sum()


def _other_slots(*args: Any) -> Tensor:
    """Keys go elsewhere than latents."""
    moved = [*args]
    rows = aten.index_copy.default(args[6], 1, args[7] + 1, torch.zeros(1, 1, 8))
    moved[6] = rows
    return _step(*moved)


@pytest.mark.parametrize("step", [_read_before, _other_slots])
def test_caches_used_otherwise_stay(step: Any) -> None:
    gm = _traced(_halves, _halves, step)
    assert place_cache_writes(gm) == 0
    assert not _calls(gm)


def test_a_norm_of_something_else_stays() -> None:
    """Latents that are normalized over more than themselves are written as they come."""

    def step(*args: Any) -> Tensor:
        moved = [*args]
        moved[2] = args[2] * (args[0] @ args[1]).sum()
        return _step(*moved)

    gm, before = _traced(_halves, _halves, step), _traced(_halves, _halves, step)
    assert place_cache_writes(gm) == 1
    _same(gm, before)


def test_partial_rotations_are_rotations() -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _halves(x, torch.cat((cos[..., :2], torch.ones_like(cos[..., 2:])), -1), sin * 0.5)

    gm = _traced(partial, partial)
    decode = gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.mla_decode.default)[0]
    fed = fed_by_tokens(gm.graph)
    writes = gm.graph.find_nodes(op="call_function", target=aten.index_copy.default)
    keys, queries = (rotation_before(n, fed) for n in (writes[1].args[3], decode.args[1]))
    assert keys is not None
    assert queries is not None
    with torch.no_grad():
        assert pairs_of(keys, [queries], 1, 1) == ("halves", [queries])
