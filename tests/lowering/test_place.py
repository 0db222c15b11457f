"""A whole decode step whose products of one row are placed as on CUDA, with the references for kernels."""

from __future__ import annotations

import pytest
import torch

import mlacompile
from mlacompile.kernels import registry
from mlacompile.kernels.registry import Kernel
from mlacompile.lowering import place, single_row
from mlacompile.ops import head_product_reference, row_product_reference
from mlacompile.testing import models

REFERENCES = {"row_product": row_product_reference, "head_product": head_product_reference}


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take everything, on the CPU."""
    real = registry.kernels
    willing = {op: (Kernel("triton", op, lambda *_, **__: [], run),) for op, run in REFERENCES.items()}
    monkeypatch.setattr(registry, "kernels", lambda op: willing.get(op) or real(op))
    monkeypatch.setattr(single_row, "SMALLEST", 1)
    monkeypatch.setattr(single_row, "_one_row", lambda value, dim: value.shape[dim] == 1)
    monkeypatch.setattr(place, "place_cpu_rows", lambda gm: 0)


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
