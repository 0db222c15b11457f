"""What is left of a graph once attention is absorbed: nothing as large as expanded keys, one decode op a layer,
views of live weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.fx import GraphModule

import mlacompile.compiler as compiler
from mlacompile import backend
from mlacompile.ops import mla_decode, mla_decode_reference
from mlacompile.testing import models
from tests.spellings import Attention, Spelling


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Every graph that reaches the last stage."""
    graphs: list[GraphModule] = []
    original = compiler.compile_rest

    def spy(gm: GraphModule, *args: object) -> object:
        graphs.append(gm)
        return original(gm, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "compile_rest", spy)
    torch._dynamo.reset()
    return graphs


def decodes(gm: GraphModule) -> int:
    targets = Counter(n.target for n in gm.graph.nodes)
    return sum(targets[t] for t in (mla_decode_reference, torch.ops.mlacompile.mla_decode.default, mla_decode))


@pytest.mark.parametrize("change", [{}, {"projection": "separate"}, {"projection": "slices"}, {"attention": "einsum"}])
def test_no_expanded_tensor_is_left(change: dict[str, str], rewritten: list[GraphModule]) -> None:
    spelling = replace(Spelling(cache="apart", mask="none"), **change)  # type: ignore[arg-type]
    batch, context = 2, 61
    module = Attention(spelling, batch, context)
    with torch.no_grad():
        torch.compile(module, backend=backend, options={"rest": "eager"})(torch.randn(batch, 1, spelling.hidden), 60)
    (graph,) = rewritten
    assert decodes(graph) == 1
    # Largest tensor that depends on the cache: the cache itself. Expanded keys would be heads times nope wide.
    allowed = batch * context * max(spelling.rank, spelling.pe, spelling.heads)
    expanded = batch * context * spelling.heads * min(spelling.nope, spelling.v)
    assert allowed < expanded
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and context in value.shape:
            assert value.numel() <= allowed, f"{node.format_node()} has {value.numel()} elements"


@pytest.mark.parametrize("layers", [1, 3])
def test_one_decode_a_layer(layers: int, rewritten: list[GraphModule]) -> None:
    model = models.tiny_model("deepseek_v3", num_hidden_layers=layers, first_k_dense_replace=layers)
    cache = models.static_cache(model, 1, 32, length=5)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, options={"rest": "eager"})
        compiled(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert [decodes(g) for g in rewritten] == [layers]


def test_weights_are_read_in_place(rewritten: list[GraphModule]) -> None:
    spelling = Spelling(cache="apart", mask="none")
    module = Attention(spelling, 1, 32)
    with torch.no_grad():
        torch.compile(module, backend=backend, options={"rest": "eager"})(torch.randn(1, 1, spelling.hidden), 31)
    (graph,) = rewritten
    copies = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default)
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.bmm.default:
            weight = node.args[1]
            while weight.op == "call_function":
                assert weight.target not in copies, f"the absorbed weight is copied by {weight}"
                weight = weight.args[0]
            assert weight.op == "placeholder"
