"""What prompts have to know of the cache is read once, before the first layer."""

from __future__ import annotations

import pytest
import torch

import mlacompile
from mlacompile.lowering import place, read_early
from mlacompile.testing import models

BOUNDS = torch.ops.mlacompile.visible_bounds.default


@pytest.mark.parametrize("held", [0, 7])
def test_all_layers_share_one_reading_at_the_start(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def spy(gm: torch.fx.GraphModule) -> int:
        graphs.append(gm)
        return read_early.read_early(gm)

    monkeypatch.setattr(place, "read_early", spy)
    config = models.tiny_config("deepseek_v3", num_hidden_layers=3, first_k_dense_replace=3)
    model = models.build_model(config, dtype=torch.float32, device="cpu")
    tokens = models.random_tokens(config, 2, 9, device="cpu")
    cache = models.static_cache(model, 2, 32, random=True)
    compiled = torch.compile(model, backend="mlacompile", options={"rest": "eager", "form": "expanded"})
    logits = []
    for run in (model, compiled):
        models.set_length(cache, held)
        with torch.no_grad():
            logits.append(run(input_ids=tokens, past_key_values=cache).logits)
    assert {site.form for site in mlacompile.last_report().sites} == {"chunked"}
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5 * float(logits[0].abs().max()))
    (gm,) = graphs
    assert not gm.graph.find_nodes(op="call_function", target=BOUNDS), "it is read before the graph is called"
    (bounds,) = (n for n in gm.graph.find_nodes(op="placeholder") if n.name.startswith("bounds"))
    assert [user.target for user in bounds.users] == [read_early.PREFILL] * 3


def test_readings_of_large_masks_stay_in_the_graph() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def prompt(q: torch.Tensor, c: torch.Tensor, w: torch.Tensor, at: torch.Tensor, tokens: int) -> torch.Tensor:
        mask = (torch.arange(tokens) != at).expand(2, 1, tokens)
        seen = (q, c, None, w, w, mask, None, None)
        return torch.ops.mlacompile.mla_prefill(*seen, scale=1.0, causal=True, nope_at=0, pe_at=0, chunk=8)[0]

    for tokens, small in ((9, True), (70000, False)):
        args = (torch.randn(2, 3, 4, 5), torch.randn(2, tokens, 2), torch.randn(3, 5, 2), torch.tensor(3))
        gm = make_fx(lambda *a, t=tokens: prompt(*a, t), tracing_mode="fake")(*args)
        assert read_early.read_early(gm) == 1
        before = read_early.take_out(gm)
        assert (before is not None) is small
        if small:
            got = read_early.with_before(gm, before)(*args)
            torch.testing.assert_close(got, prompt(*args, tokens))


def test_what_draws_random_numbers_stays_where_it_is() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def prompt(q: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(2)
        length = torch.randint(4, 9, (2,))
        seen = (q, c, None, w, w, None, None, length)
        out, _ = torch.ops.mlacompile.mla_prefill(
            *seen, scale=1.0, causal=True, nope_at=0, pe_at=0, chunk=8, impl="auto"
        )
        return out + noise[0]

    gm = make_fx(prompt, tracing_mode="fake")(torch.randn(2, 3, 4, 5), torch.randn(2, 9, 6), torch.randn(3, 5, 6))
    assert read_early.read_early(gm) == 1
    gm.graph.lint()
    draws = [n for n in gm.graph.nodes if "rand" in str(n.target)]
    assert [str(n.target) for n in draws] == ["aten.rand.default", "aten.randint.low"]
    (reading,) = gm.graph.find_nodes(op="call_function", target=BOUNDS)
    assert draws[-1] < reading
