"""Real architectures of transformers: every latent attention layer is absorbed, and the logits stay what they were.

Weights are random and layers few; architectures, caches and attention code are the library's own. Most runs leave the
rest of the graph to eager mode, where compiling takes a second; one goes through Inductor. ``MLACOMPILE_FULL=1`` runs
every combination instead of a selection in which each family meets each choice.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from mlacompile import backend, last_report
from mlacompile.testing.models import attention_layers, random_tokens, tiny_model

FULL = os.environ.get("MLACOMPILE_FULL") == "1"
STEPS, PROMPT, BATCH = 20, 8, 2
EAGER = {"rest": "eager"}

FAMILIES = ("deepseek_v3", "deepseek_v2", "minicpm3", "deepseek_v32")
CHOICES = list(itertools.product(("sdpa", "eager"), ("static", "dynamic"), (False, True)))
SELECTED = [
    ("deepseek_v3", "sdpa", "static", True),
    ("deepseek_v3", "eager", "dynamic", False),
    ("deepseek_v2", "sdpa", "dynamic", True),
    ("deepseek_v2", "eager", "static", False),
    ("minicpm3", "sdpa", "dynamic", False),
    ("minicpm3", "eager", "static", True),
    ("deepseek_v32", "sdpa", "static", False),
    ("deepseek_v32", "eager", "dynamic", True),
]
CASES = [(f, *c) for f in FAMILIES for c in CHOICES] if FULL else SELECTED


def new_cache(model: Any, kind: str, length: int = 40) -> Any:
    return (
        StaticCache(config=model.config, max_cache_len=length)
        if kind == "static"
        else DynamicCache(config=model.config)
    )


def decode(model: Any, run: Callable[..., Any], cache: str, padded: bool, steps: int = STEPS) -> list[torch.Tensor]:
    """Logits of ``steps`` decode steps by ``run``, after a prompt that the plain model reads."""
    past = new_cache(model, cache)
    attend = torch.ones(BATCH, 40, dtype=torch.long)
    attend[0, :3] = 0
    tokens = random_tokens(model.config, BATCH, PROMPT + steps)

    def mask(length: int) -> torch.Tensor | None:
        """As generate() gives it: none without padding, all of a static cache, or what a growing one holds."""
        return None if not padded else attend if cache == "static" else attend[:, :length]

    logits = []
    with torch.no_grad():
        model(input_ids=tokens[:, :PROMPT], attention_mask=mask(PROMPT), past_key_values=past)
        for i in range(PROMPT, PROMPT + steps):
            out = run(input_ids=tokens[:, i : i + 1], attention_mask=mask(i + 1), past_key_values=past)
            logits.append(out.logits)
    return logits


def worst(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest difference of any step, relative to that step's largest logit."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


class Counting:
    """The backend, and how often it was called."""

    reset = staticmethod(backend.reset)  # as Dynamo's reset calls it

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm: Any, inputs: Any, **settings: Any) -> Any:
        self.calls += 1
        return backend(gm, inputs, **settings)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("family", "attn", "cache", "padded"), CASES)
def test_every_layer_is_absorbed_and_logits_agree(family: str, attn: str, cache: str, padded: bool) -> None:
    dense = {} if family == "minicpm3" else {"first_k_dense_replace": 2 if cache == "dynamic" else 1}
    model = tiny_model(family, attn=attn, num_hidden_layers=2, **dense)
    want = decode(model, model, cache, padded)
    counting = Counting()
    got = decode(model, torch.compile(model, backend=counting, options=EAGER), cache, padded)
    report = last_report()
    assert report.absorbed == attention_layers(model.config), report
    assert counting.calls <= (1 if cache == "static" else 3), "a length must not be compiled for"
    assert report.refused == 0
    assert worst(got, want) <= 1e-5


def test_a_family_through_inductor() -> None:
    layers = 3 if FULL else 1
    model = tiny_model("deepseek_v3", num_hidden_layers=layers)
    want = decode(model, model, "static", padded=True)
    got = decode(model, torch.compile(model, backend=backend), "static", padded=True)
    report = last_report()
    assert report.absorbed == layers
    assert worst(got, want) <= 1e-5


def test_llama_is_left_exactly_as_inductor_has_it() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    stock = decode(model, torch.compile(model), "static", padded=True, steps=3)
    torch._dynamo.reset()
    got = decode(model, torch.compile(model, backend=backend), "static", padded=True, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(got, stock, strict=True))
    report = last_report()
    assert (report.absorbed, report.refused) == (0, 1)
    for site in report.sites:
        assert re.search(r"\.py:\d+$", site.source)
        assert re.search(r"\.py:\d+", site.reason), "the reason says where keys are stored"
        assert "grouped-query attention" in site.reason


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_prompt_stays_expanded_and_decoding_after_it_is_absorbed(cache: str, slow_hardware: str) -> None:
    """Reckoned with the rates of one device, so that the border is the same wherever this runs."""
    model = tiny_model("minicpm3", num_hidden_layers=1)
    compiled = torch.compile(model, backend=backend, options=EAGER | {"hardware": slow_hardware})
    tokens = random_tokens(model.config, BATCH, 18)
    pasts = new_cache(model, cache), new_cache(model, cache)
    with torch.no_grad():
        for start, stop in ((0, 14), (14, 15), (15, 16), (16, 17), (17, 18)):
            got, want = (
                run(input_ids=tokens[:, start:stop], past_key_values=past).logits
                for run, past in zip((compiled, model), pasts, strict=True)
            )
            assert worst([got], [want]) <= 1e-5
            report = last_report()
            assert (report.absorbed, report.expanded) == ((0, 1) if start == 0 else (1, 0)), report


def test_another_batch_and_another_length_cost_few_compilations() -> None:
    """Every batch and cache length gives right results; after the second of each, shapes are symbolic and shared."""
    model = tiny_model("minicpm3", num_hidden_layers=1)
    counting = Counting()
    compiled = torch.compile(model, backend=counting, options=EAGER)
    for batch, length in ((2, 24), (3, 24), (4, 24), (5, 24), (5, 40), (3, 56), (2, 33)):
        tokens = random_tokens(model.config, batch, 10)
        results = []
        for run in (model, compiled):
            past = new_cache(model, "static", length)
            with torch.no_grad():
                model(input_ids=tokens[:, :8], past_key_values=past)
                results.append([run(input_ids=tokens[:, i : i + 1], past_key_values=past).logits for i in (8, 9)])
        assert worst(*results) <= 1e-5, (batch, length)
        assert last_report().absorbed == 1
    assert counting.calls <= 6, "one compilation for each new kind of shape, not for each shape"


def test_invisible_cache_rows_may_hold_anything() -> None:
    """NaN and infinities in rows that are not written yet, and in left padding, reach no logit."""
    model = tiny_model("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=2)
    compiled = torch.compile(model, backend=backend, options=EAGER)
    tokens = random_tokens(model.config, BATCH, 12)
    attend = torch.ones(BATCH, 24, dtype=torch.long)
    attend[0, :3] = 0
    results = []
    for poison in (None, float("nan"), float("inf"), float("-inf")):
        past = new_cache(model, "static", 24)
        with torch.no_grad():
            model(input_ids=tokens[:, :8], attention_mask=attend, past_key_values=past)
            if poison is not None:
                for layer in past.layers:
                    for rows in (layer.keys, layer.values):
                        rows[:, :, 8:] = poison
                        rows[0, :, :3] = poison
            steps = [
                compiled(input_ids=tokens[:, i : i + 1], attention_mask=attend, past_key_values=past).logits
                for i in range(8, 12)
            ]
        results.append(torch.stack(steps))
    assert last_report().absorbed == 2
    assert torch.isfinite(results[0]).all()
    for poisoned in results[1:]:
        assert torch.equal(poisoned, results[0])


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_writing_past_the_end_of_a_cache_is_an_error(rest: str, one_thread: None) -> None:
    """One thread: inside a parallel loop, Inductor's check ends the process with the same message."""
    model = tiny_model("minicpm3", num_hidden_layers=1)
    compiled = torch.compile(model, backend=backend, options={"rest": rest})
    tokens = random_tokens(model.config, 1, 12)
    past = new_cache(model, "static", 10)
    with torch.no_grad():
        model(input_ids=tokens[:, :8], past_key_values=past)
        for i in (8, 9):
            assert torch.isfinite(compiled(input_ids=tokens[:, i : i + 1], past_key_values=past).logits).all()
        with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
            compiled(input_ids=tokens[:, 10:11], past_key_values=past)


# The backend raises this limit from wherever it is, and one that three layers reach costs less to reach than torch's 8.
@torch._dynamo.config.patch(recompile_limit=8 if FULL else 3)
def test_more_layers_than_torch_compiles_a_function_for_all_run_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers share one function in Dynamo's eyes and are guarded on their number; none may fall back to eager mode."""
    from mlacompile.lowering import select

    calls = []
    reference = select.mla_decode_reference

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2].shape)
        return reference(*args, **kwargs)

    monkeypatch.setattr(select, "mla_decode_reference", spy)
    layers = 12 if FULL else 5
    model = tiny_model("minicpm3", num_hidden_layers=layers)
    want = decode(model, model, "static", padded=False, steps=2)
    for layer in model.model.layers:
        layer.compile(backend=backend, options=EAGER | {"verify": "off", "kernel": "reference"})
    got = decode(model, model, "static", padded=False, steps=2)
    assert worst(got, want) <= 1e-5
    assert len(calls) == 3 * layers, "a prompt of at most eight tokens is decoded on the latent too, then two steps"
    assert last_report().absorbed == 1, "one frame, of which the report keeps the latest compilation"
