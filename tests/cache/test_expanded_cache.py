"""A LatentCache in the hands of code that caches expanded keys and values: the compiled graph stores the latents.

``MLACOMPILE_FULL=1`` tries every kind of cache with every batch.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from mlacompile import LatentCache, backend, last_report
from mlacompile.errors import CacheError
from mlacompile.testing.models import tiny_config
from tests.wild import rope_half

H, HIDDEN, R, N, P, V, ROWS = 4, 32, 20, 12, 8, 10, 24
OPTIONS = {"rest": "eager", "form": "absorbed"}


class Old(nn.Module):
    """What transformers did before 5.15: expand, cache, attend. near: a step that no latent survives."""

    def __init__(self, layers: int = 2, near: str = "") -> None:
        super().__init__()
        self.near = near
        self.q = nn.ModuleList(nn.Linear(HIDDEN, H * (N + P)) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, R + P) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(R, H * (N + V)) for _ in range(layers))
        self.o = nn.ModuleList(nn.Linear(H * V, HIDDEN) for _ in range(layers))

    def forward(self, x: Tensor, at: Tensor, cache: Any) -> Tensor:
        b, s, _ = x.shape
        for i, (to_q, down, up, o) in enumerate(zip(self.q, self.down, self.up, self.o, strict=True)):
            q = to_q(x).view(b, s, H, N + P).transpose(1, 2)
            q = torch.cat((q[..., :N], rope_half(q[..., N:], at)), -1)
            c, pe = down(x).split([R, P], -1)
            c = nn.functional.rms_norm(c, (R,))
            k, v = up(c).view(b, s, H, N + V).transpose(1, 2).split([N, V], -1)
            k = k.relu() if self.near == "nonlinear" else k
            pe = rope_half(pe.view(b, 1, s, P), at)
            k, v = cache.update(torch.cat((k, pe.expand(-1, H, -1, -1)), -1), v, i)
            seen = torch.arange(ROWS) <= at[:, None]
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None])
            x = x + o(y.transpose(1, 2).reshape(b, s, -1))
        return x


def latent_cache(batch: int, **kinds: Any) -> LatentCache:
    config = tiny_config("deepseek_v3", num_hidden_layers=2)
    cache = LatentCache(config, ROWS, **{"rank": R, "rope": P, **kinds})
    cache.early_initialization(batch)
    return cache


PLAIN: dict[str, Any] = {}
FP8 = {"dtype": "fp8_e4m3", "rope_dtype": "fp32"}
FULL = os.environ.get("MLACOMPILE_FULL") == "1"


@pytest.mark.parametrize(
    ("batch", "kinds"),
    [(1, PLAIN), (2, FP8), *([(1, FP8), (2, PLAIN)] if FULL else [])],
    ids=lambda x: str(x) if isinstance(x, int) else "fp8" if x else "plain",
)
def test_what_is_stored_are_latents(batch: int, kinds: dict[str, Any]) -> None:
    """Also when the very first token comes alone. Poisoned: rows that hold nothing are NaN."""
    torch.manual_seed(0)
    model = Old().eval()
    twin, step = copy.deepcopy(model), torch.compile(model, backend=backend, options=OPTIONS)
    latents = latent_cache(batch, **kinds)
    expanded = StaticCache(config=tiny_config("deepseek_v3", num_hidden_layers=2), max_cache_len=ROWS)
    if not kinds:
        for layer in latents.latent_layers:
            layer.store.tokens.fill_(float("nan"))
    position = 0
    with torch.no_grad():
        for length in (5, 1, 1, 3, 1):
            x, at = torch.randn(batch, length, HIDDEN), torch.arange(position, position + length)
            want, got = twin(x, at, expanded), step(x, at, latents)
            tolerance = 1e-5 if not kinds else 0.1  # e4m3 keeps four digits of a latent
            assert float((got - want).abs().max() / want.abs().max()) <= tolerance
            assert (last_report().absorbed, last_report().refused) == (2, 0), last_report()
            position += length
    assert int(latents.layers[0].cumulative_length) == position
    held = sum(x.numel() for x in latents.layers[0].store.arrays().values())
    assert kinds or held == batch * ROWS * (R + P)
    rows = latents.layers[0].keys[:, 0, :position]
    assert torch.isfinite(rows).all()


def test_eager_mode_is_an_error_that_says_what_to_do() -> None:
    with torch.no_grad(), pytest.raises(CacheError, match=r"compile all that uses the cache, the prompt too"):
        Old().eval()(torch.randn(1, 3, HIDDEN), torch.arange(3), latent_cache(1))


def test_another_backend_is_an_error_that_says_what_to_do() -> None:
    step = torch.compile(Old().eval(), backend="aot_eager")
    with torch.no_grad(), pytest.raises(CacheError, match="only a graph that mlacompile compiles shows"):
        step(torch.randn(1, 3, HIDDEN), torch.arange(3), latent_cache(1))


@pytest.mark.parametrize(
    ("near", "kinds", "reason"),
    [
        ("nonlinear", {}, "not linear in a latent"),
        ("", {"rank": R - 1}, rf"from {R} and {P} values a token, not {R - 1}"),
    ],
)
def test_keys_without_such_a_latent_are_an_error(near: str, kinds: dict[str, Any], reason: str) -> None:
    cache = latent_cache(2, **kinds)
    step = torch.compile(Old(near=near).eval(), backend=backend, options=OPTIONS)
    with torch.no_grad(), pytest.raises(Exception, match=rf"cannot be told: .*{reason}.*Use StaticCache"):
        step(torch.randn(2, 3, HIDDEN), torch.arange(3), cache)


def test_the_batch_has_to_be_static() -> None:
    """One that changes becomes symbolic, which is an error that says what to do; marked as static each is compiled."""
    step = torch.compile(Old(layers=1).eval(), backend=backend, options=OPTIONS)
    with torch.no_grad():
        step(torch.randn(2, 3, HIDDEN), torch.arange(3), latent_cache(2))
        x = torch.randn(3, 3, HIDDEN)
        with pytest.raises(Exception, match="the batch or the size of the cache is symbolic; mark both as static"):
            step(x, torch.arange(3), latent_cache(3))
        torch._dynamo.reset()
        for batch in (2, 3):
            x = torch.randn(batch, 3, HIDDEN)
            torch._dynamo.mark_static(x, 0)
            step(x, torch.arange(3), latent_cache(batch))
            assert (last_report().absorbed, last_report().refused) == (1, 0)
