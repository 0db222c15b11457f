"""A whole decode step whose products of one row are placed as on CUDA, with the references for kernels."""

from __future__ import annotations

import pytest
import torch

import mlacompile
import mlacompile.compiler as compiler
from mlacompile.lowering import place, single_row
from mlacompile.ops import head_product_reference, row_product_reference
from mlacompile.testing import models
from tests.lowering.rewritten import willing

REFERENCES = {"row_product": row_product_reference, "head_product": head_product_reference}


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take everything, on the CPU."""
    willing(monkeypatch, REFERENCES, name="triton")
    monkeypatch.setattr(single_row, "SMALLEST", 1)
    monkeypatch.setattr(single_row, "_one_row", lambda value, dim: value.shape[dim] == 1)
    monkeypatch.setattr(place, "place_cpu_rows", lambda gm, fused: 0)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "minicpm3"])
def test_a_step_of_one_sequence(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch)
    dense = {"first_k_dense_replace": 2} if model_type == "deepseek_v3" else {}
    config = models.tiny_config(model_type, num_hidden_layers=2, **dense)
    model = models.build_model(config, dtype=torch.float32, device="cpu")
    tokens = models.random_tokens(config, 1, 1, device="cpu")
    cache = models.static_cache(model, 1, 32, random=True)
    compiled = torch.compile(model, backend="mlacompile", options={"rest": "eager"})
    logits = []
    for run in (model, compiled):
        models.set_length(cache, 31)
        with torch.no_grad():
            logits.append(run(input_ids=tokens, past_key_values=cache).logits)
    report = mlacompile.last_report()
    assert report.absorbed == 2
    # seven weights and two absorbed products a layer, and the output head
    assert f"{2 * 9 + 1} products with a single row" in " ".join(report.notes)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5 * float(logits[0].abs().max()))


def test_a_step_of_one_sequence_on_weights_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released originals: products that were FP8 before the graph was made take what stands around them too."""
    _stand_in(monkeypatch)
    monkeypatch.setattr(single_row, "SMALLEST", 1 << 14)
    graphs: list[torch.fx.GraphModule] = []
    lowered = compiler.compile_rest
    monkeypatch.setattr(compiler, "compile_rest", lambda gm, *more: graphs.append(gm) or lowered(gm, *more))
    sizes = {"hidden_size": 256, "intermediate_size": 384, "q_lora_rank": 128, "kv_lora_rank": 256}
    heads = {"qk_nope_head_dim": 128, "v_head_dim": 128, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    config = models.tiny_config("deepseek_v3", **sizes, **heads)
    model = models.build_model(config, dtype=torch.float32, device="cpu")
    mlacompile.quantize(model)
    tokens = models.random_tokens(config, 1, 1, device="cpu")
    cache = models.static_cache(model, 1, 16, random=True)
    compiled = torch.compile(model, backend="mlacompile", options={"rest": "eager", "fp8": {"*": "absorb"}})
    logits = []
    for run in (model, compiled):
        models.set_length(cache, 15)
        with torch.no_grad():
            logits.append(run(input_ids=tokens, past_key_values=cache).logits)
    calls = list(graphs[0].graph.find_nodes(op="call_function", target=torch.ops.mlacompile.row_product.default))
    shapes = [
        (len(c.args[1]), len(c.args[2]), c.args[3] is not None, c.args[4] is not None, c.kwargs["gate"]) for c in calls
    ]
    layer = [(2, 2, True, False, ""), (1, 1, True, False, ""), (1, 1, False, True, ""), (2, 2, True, False, "silu")]
    assert shapes == [*layer, (1, 1, False, True, "")] * 2 + [(1, 0, True, False, "")]
    heads_only = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.mlacompile.fp8_linear.default)
    assert [n.args[2].meta["val"].dim() for n in heads_only] == [3] * 4
    # In eager mode a context of 16 rows goes through the up-projection unquantized.
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4 * float(logits[0].abs().max()))
