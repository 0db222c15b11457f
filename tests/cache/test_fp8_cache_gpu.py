"""LatentCache in FP8 on a GPU: a compiled step attends to the bytes of the cache, and agrees with eager mode."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from mlacompile import LatentCache, backend, last_report
from mlacompile.testing.models import random_tokens, tiny_model
from tests.cache.test_latent_cache import relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

mla_decode_module = import_module("mlacompile.ops.mla_decode")  # the package has a function of that name
KINDS = [{"dtype": "fp8_e4m3"}, {"dtype": "fp8_e4m3", "scales": "token"}, {"dtype": "fp8_e5m2"}]


def last_step(model: torch.nn.Module, step: Any, cache: LatentCache) -> torch.Tensor:
    """Logits of the third token after a prompt of eight."""
    tokens = random_tokens(model.config, 2, 11, device="cuda")
    with torch.no_grad():
        model(tokens[:, :8], past_key_values=cache)
        for i in range(8, 11):
            logits = step(tokens[:, i : i + 1], past_key_values=cache).logits.clone()
    return logits


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("cudagraphs", [False, True])
def test_a_compiled_step_attends_to_the_bytes(
    kind: dict[str, str], cudagraphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    choose = mla_decode_module._implementation

    def spy(impl: str, tensors: tuple[torch.Tensor, ...], *settings: Any) -> Any:
        given.extend((tensors[2], tensors[3], tensors[8]))
        return choose(impl, tensors, *settings)

    monkeypatch.setattr(mla_decode_module, "_implementation", spy)
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16, device="cuda", num_hidden_layers=2)
    caches = [LatentCache(model.config, max_cache_len=64, **kind) for _ in range(2)]
    want = last_step(model, model, caches[0])
    compiled = torch.compile(model, backend=backend, options={"cudagraphs": cudagraphs, "strict": True})
    got = last_step(model, compiled, caches[1])
    assert relative(got.float(), want.float()) <= 3e-2  # two orders of rounding in bfloat16
    assert {site.kernel for site in last_report().sites} <= {"gluon", "triton"}
    stores = [layer.store for layer in caches[1].latent_layers]
    memory = {array.untyped_storage().data_ptr() for store in stores for array in store.arrays().values()}
    assert given
    assert {x.untyped_storage().data_ptr() for x in given} <= memory, "a copy of the cache was read"
