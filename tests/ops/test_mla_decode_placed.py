"""The op that compiled graphs call on a CPU: the same results as ``mla_decode``, and few Python frames a call."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import mlacompile.ops.mla_decode_placed  # noqa: F401  (registers the op)
from mlacompile.ops import mla_decode
from mlacompile.testing import models
from mlacompile.testing.latents import LatentCase, LatentInputs, make_inputs, quantized

PLACED = torch.ops.mlacompile.mla_decode_placed.default
CASES = {
    "float32": LatentCase(2, 4, 2, 40, 32, 8, torch.float32, causal=True, length=True),
    "bfloat16": LatentCase(2, 4, 2, 40, 32, 8, torch.bfloat16, mask="additive"),
    "no rope": LatentCase(1, 4, 1, 40, 24, 0, torch.float32, start=True),
}


def arguments(inputs: LatentInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tensors = (*inputs.tensors, *[None] * (9 - len(inputs.tensors)))
    return (*tensors[:7], tensors[8]), {"scale": inputs.keywords["scale"], "causal": inputs.keywords["causal"]}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_mla_decode(case: LatentCase) -> None:
    inputs = make_inputs(case)
    args, settings = arguments(inputs)
    for got, want in zip(PLACED(*args, **settings), mla_decode(*inputs.tensors, **inputs.keywords), strict=True):
        assert torch.equal(got, want)
    torch.library.opcheck(PLACED, args, settings)


def test_is_mla_decode_on_fp8() -> None:
    stored, _ = quantized(make_inputs(LatentCase(1, 4, 1, 40, 256, 64, torch.float32, length=True)))
    args, settings = arguments(stored)
    for got, want in zip(PLACED(*args, **settings), mla_decode(*stored.tensors, **stored.keywords), strict=True):
        assert torch.equal(got, want)


def test_latents_that_lie_apart_are_copied() -> None:
    inputs = make_inputs(CASES["float32"])
    args, settings = arguments(inputs)
    apart = list(args)
    apart[2] = args[2].transpose(1, 2).contiguous().transpose(1, 2)
    for got, want in zip(PLACED(*apart, **settings), PLACED(*args, **settings), strict=True):
        assert torch.equal(got, want)


def test_a_compiled_step_calls_it() -> None:
    """Every layer, and nothing looks at its inputs again: that is what ``mla_decode`` does for those who call it."""
    config = models.tiny_config("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=2)
    model = models.build_model(config, dtype=torch.float32, device="cpu")
    tokens = models.random_tokens(config, 1, 1, device="cpu")
    cache = models.static_cache(model, 1, 32, random=True)
    compiled = torch.compile(model, backend="mlacompile")

    def step(run: Any) -> torch.Tensor:
        models.set_length(cache, 31)
        with torch.no_grad():
            logits: torch.Tensor = run(input_ids=tokens, past_key_values=cache).logits
        return logits

    want, _ = step(model), step(compiled)
    called: list[str] = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        got = step(compiled)
    finally:
        sys.setprofile(None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert called.count("mla_decode_cpu") == 2
    assert "_check" not in called
    assert "backend_impl" not in called  # of torch.library.custom_op
