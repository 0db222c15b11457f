"""The backend as a whole: what it compiles stays right when shapes, weights, dtypes, models and threads change.

Small modules that spell latent attention out take the place of models; ``test_models.py`` has those.
"""

from __future__ import annotations

import copy
import itertools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlacompile
from mlacompile import Options, backend, compiler, explain, last_report
from mlacompile.errors import OptionsError, RefusedSiteError, VerificationError
from mlacompile.lowering import select
from mlacompile.testing.models import random_tokens, static_cache, tiny_model
from tests.spellings import Attention, Spelling

CONTEXT = 16
EAGER = {"rest": "eager"}
CACHED = Spelling(cache="apart", mask="bool")


def layer(seed: int = 0, spelling: Spelling = CACHED, batch: int = 2, context: int = CONTEXT) -> Attention:
    """A latent attention layer whose cache already holds something."""
    torch.manual_seed(seed)
    module = Attention(spelling, batch, context).eval().requires_grad_(False)
    for buffer in module.buffers():
        buffer.normal_()
    return module


def arguments(queries: int = 1, batch: int = 2, context: int = CONTEXT, dtype: torch.dtype = torch.float32) -> Any:
    """Input, position and mask of the last ``queries`` tokens of a context."""
    mask = torch.ones(queries, context).tril(context - queries).bool().expand(batch, 1, -1, -1)
    return torch.randn(batch, queries, CACHED.hidden).to(dtype), context - queries, mask


def close(got: Tensor, want: Tensor, bound: float = 1e-5) -> bool:
    return bool((got - want).abs().max() <= bound * want.abs().max())


class Counting:
    """The backend, and how often it was called."""

    reset = staticmethod(backend.reset)  # as Dynamo's reset calls it

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm: Any, inputs: Any, **settings: Any) -> Any:
        self.calls += 1
        return backend(gm, inputs, **settings)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the caches that ``mla_decode`` was called with at run time (with ``kernel="reference"``)."""
    calls: list[torch.Size] = []
    reference = select.mla_decode_reference

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2].shape)
        return reference(*args, **kwargs)

    monkeypatch.setattr(select, "mla_decode_reference", spy)
    return calls


SPIED = EAGER | {"kernel": "reference", "verify": "off"}


@pytest.mark.parametrize("queries", [1, 2, 5, 8])
def test_a_few_queries_are_absorbed(queries: int, decoded: list[torch.Size]) -> None:
    module, (x, position, mask) = layer(), arguments(queries)
    twin = copy.deepcopy(module)
    got = torch.compile(module, backend=backend, options=SPIED)(x, position, mask)
    assert close(got, twin(x, position, mask))
    assert decoded == [(2, CONTEXT, CACHED.rank)]
    (site,) = last_report().sites
    assert (site.status, site.form, site.queries, site.context) == ("absorbed", "absorbed", str(queries), str(CONTEXT))
    assert site.geometry == mlacompile.MLAGeometry(heads=4, rank=24, nope=12, rope=8, v=10)
    assert site.kv_layout is not None
    assert site.kv_layout.bytes_per_token == 4 * (24 + 8)


@pytest.mark.parametrize("queries", [9, 16])
def test_many_queries_stay_expanded(queries: int, decoded: list[torch.Size]) -> None:
    module, (x, position, mask) = layer(), arguments(queries)
    want = copy.deepcopy(module)(x, position, mask)
    assert torch.equal(torch.compile(module, backend=backend, options=SPIED)(x, position, mask), want)
    assert decoded == []
    (site,) = last_report().sites
    assert site.status == "expanded"
    assert f"{queries} query tokens" in site.reason


def test_a_changing_number_of_queries_is_right_and_compiled_for_few_times() -> None:
    """From the third number on it is symbolic, and each call picks the form that is cheaper for it."""
    module, counting = layer(), Counting()
    compiled = torch.compile(module, backend=counting, options=EAGER)
    for queries in (1, 4, 6, 2, 9, 1, 12, 4):
        x, _, mask = arguments(queries)
        # always to the same place: a position that changes would be another reason to compile
        assert close(compiled(x, 0, mask), copy.deepcopy(module)(x, 0, mask))
    assert counting.calls <= 3
    (site,) = last_report().sites
    assert site.form == "by length"
    assert "varying number" in site.reason


def test_the_form_can_be_forced(decoded: list[torch.Size]) -> None:
    for form, queries, expected in (("expanded", 1, 0), ("absorbed", 16, 1)):
        torch._dynamo.reset()
        module, (x, position, mask) = layer(), arguments(queries)
        want = copy.deepcopy(module)(x, position, mask)
        assert close(torch.compile(module, backend=backend, options=SPIED | {"form": form})(x, position, mask), want)
        assert len(decoded) == expected


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_one_graph_serves_three_layers(rest: str) -> None:
    """Dynamo gives modules of one shape one graph, so weights must be inputs of it and never constants."""
    counting = Counting()
    x, position, mask = arguments()
    for seed in (1, 2, 3):
        module = layer(seed)
        want = copy.deepcopy(module)(x, position, mask)
        assert close(torch.compile(module, backend=counting, options={"rest": rest})(x, position, mask), want)
    assert counting.calls == 1
    assert last_report().absorbed == 1


def test_weights_may_change_after_compilation() -> None:
    module, (x, position, mask) = layer(), arguments()
    counting = Counting()
    compiled = torch.compile(module, backend=counting, options={"verify": "off"})

    def check() -> None:
        got = compiled(x, position, mask)
        assert close(got, copy.deepcopy(module)(x, position, mask))
        seen.append(got)

    seen: list[Tensor] = []
    check()
    module.up.weight.mul_(-1.5)  # in place
    check()
    module.up.weight.data = torch.randn_like(module.up.weight)  # other storage
    check()
    module.up.weight = nn.Parameter(torch.randn_like(module.up.weight), requires_grad=False)  # another parameter
    check()
    module.load_state_dict(layer(7).state_dict())
    check()
    module.up = layer(8).up  # another module
    check()
    assert all(not close(a, b, 1e-2) for a, b in itertools.pairwise(seen))
    assert counting.calls <= 2
    assert last_report().absorbed == 1


def test_a_module_moved_to_another_dtype_is_compiled_again() -> None:
    module = layer()
    compiled = torch.compile(module, backend=backend, options=EAGER)
    x, position, mask = arguments()
    # one rounding to the dtype at each of about ten products, casts and the softmax
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        module.to(dtype)
        got, want = compiled(x.to(dtype), position, mask), copy.deepcopy(module).double()(x.double(), position, mask)
        assert got.dtype == dtype
        assert close(got.double(), want, 16 * torch.finfo(dtype).eps + 1e-6)
        assert last_report().absorbed == 1


def test_two_models_in_one_process() -> None:
    ones = layer(0), layer(1, Spelling(cache="fused", heads=3, rank=16, v=6, projection="separate"))
    x, position, mask = arguments()
    compiled = [torch.compile(m, backend=backend, options=EAGER) for m in ones]
    for _ in range(2):
        for run, module in zip(compiled, ones, strict=True):
            assert close(run(x, position, mask), copy.deepcopy(module)(x, position, mask))


def test_two_threads_compile_different_models_at_the_same_time() -> None:
    spellings = [CACHED, Spelling(cache="fused", heads=3, rank=16), Spelling(attention="einsum", cache="apart", rank=9)]
    modules = [layer(i, s) for i, s in enumerate(spellings)]
    inputs = arguments()
    wanted = [copy.deepcopy(m)(*inputs) for m in modules]
    results: list[Any] = [None] * len(modules)
    ready = threading.Barrier(len(modules))

    def work(i: int) -> None:
        try:
            ready.wait()
            with torch.no_grad():
                results[i] = torch.compile(modules[i], backend=backend, options=EAGER)(*inputs)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(modules))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, wanted, strict=True):
        assert isinstance(got, Tensor), got
        assert close(got, want)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_of_torch_compile_are_accepted(mode: str) -> None:
    module, (x, position, mask) = layer(), arguments()
    want = copy.deepcopy(module)(x, position, mask)
    assert close(torch.compile(module, backend=backend, mode=mode)(x, position, mask), want)
    assert last_report().absorbed == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"forms": "auto"}, r"unknown option 'forms'; did you mean 'form'\? \(allowed: form, fp8, cudagraphs, verify"),
        ({"qqq": 1}, r"unknown option 'qqq' \(allowed: form, "),
        ({"form": "best"}, r"form='best': expected one of 'auto', 'absorbed', 'expanded'"),
        ({"fp8": "weigths"}, r"fp8='weigths': expected one of 'off', 'weights'"),
        ({"verify": True}, r"verify=True: expected one of 'off', 'compile', 'first-call'"),
        ({"rest": None}, r"rest=None: expected one of 'inductor', 'eager'"),
        ({"kernel": "cutlass"}, r"kernel='cutlass': expected one of 'auto'"),
        ({"strict": "yes"}, r"strict='yes': expected True or False"),
        ({"cudagraphs": 1}, r"cudagraphs=1: expected True, False or None"),
        ({"dump": 3}, r"dump=3: expected the path of a folder"),
    ],
    ids=str,
)
def test_bad_options_list_the_allowed_ones(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionsError, match=expected):
        Options.parse(options)
    module = layer()
    with pytest.raises(Exception, match=expected):
        torch.compile(module, backend=backend, options=options)(*arguments())
    with pytest.raises(OptionsError, match=expected):
        explain(module, *arguments(), options=options)


def test_bad_modes_and_arguments_are_errors() -> None:
    with pytest.raises(OptionsError, match=r"mode='fast': expected one of None, 'default', 'reduce-overhead'"):
        backend(torch.fx.symbolic_trace(nn.ReLU()), [torch.ones(1)], mode="fast")
    with pytest.raises(OptionsError, match="unknown arguments 'dynamic'"):
        backend(torch.fx.symbolic_trace(nn.ReLU()), [torch.ones(1)], dynamic=True)
    with pytest.raises(OptionsError, match="must be a dict or Options, got list"):
        Options.parse([("form", "auto")])  # type: ignore[arg-type]
    assert Options.parse(Options(form="expanded")).form == "expanded"


def test_a_training_graph_goes_to_inductor_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "_warned", set())
    caplog.set_level(logging.WARNING, "mlacompile")
    for spelling, rest in ((Spelling(attention="matmul", rope="none"), "inductor"), (Spelling(rank=20), "eager")):
        torch.manual_seed(0)
        module = Attention(spelling)
        twin = copy.deepcopy(module)
        x = torch.randn(2, 5, spelling.hidden)
        torch.compile(module, backend=backend, options={"rest": rest})(x).square().sum().backward()
        twin(x).square().sum().backward()
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    report = last_report()
    assert report.sites == ()
    assert any("needs gradients" in note and "no_grad" in note for note in report.notes)
    warnings = [r for r in caplog.records if r.name == "mlacompile" and "needs gradients" in r.getMessage()]
    assert len(warnings) == 1


class Mixed(nn.Module):
    """A latent attention layer, and two attentions of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = layer()

    def forward(self, x: Tensor, position: int, mask: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        attend = torch.nn.functional.scaled_dot_product_attention
        first = attend(k[:, :, :1], k, k)
        second = attend(k[:, :, :1], k[:, :2], k[:, :2], enable_gqa=True)
        return self.latent(x, position, mask), first, second


def test_strict_names_every_refused_site() -> None:
    module, k = Mixed(), torch.randn(2, 4, 8, 16)
    assert close(*(f(*arguments(), k)[1] for f in (torch.compile(module, backend=backend, options=EAGER), module)))
    report = last_report()
    assert (report.absorbed, report.refused) == (1, 2)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="2 attention ops cannot be rewritten") as caught:
        torch.compile(module, backend=backend, options=EAGER | {"strict": True})(*arguments(), k)
    refused = [s for s in report.sites if s.status == "refused"]
    assert len({s.source for s in refused}) == 2
    for site in refused:
        assert f"{site.source}: {site.reason}" in str(caught.value)
    with pytest.raises(RefusedSiteError, match="2 attention ops"):
        explain(module, *arguments(), k, options={"strict": True})


def test_strict_has_nothing_against_what_is_absorbed_or_expanded() -> None:
    for queries in (1, 9):
        torch._dynamo.reset()
        torch.compile(layer(), backend=backend, options=EAGER | {"strict": True})(*arguments(queries))
        assert last_report().refused == 0


def test_the_dump_folder_holds_the_graph_after_every_stage(tmp_path: Path) -> None:
    torch.compile(layer(), backend=backend, options=EAGER | {"dump": tmp_path / "graphs"})(*arguments())
    (folder,) = (tmp_path / "graphs").iterdir()
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == [
        *("0-dynamo.py", "1-canonical.py", "2-functional.py", "3-canonical.py", "4-absorbed.py", "6-lowered.py"),
    ]
    text = [f.read_text() for f in files]
    for file, source in zip(files, text, strict=True):
        compile(source, file.name, "exec")
        assert "spellings.py" in source, "lines of the user's source"
        assert "f32[2, " in source, "shapes"
    assert "scaled_dot_product_attention" in text[0]
    assert "mlacompile.attention" in text[1]
    assert "mla_decode" in text[4]
    assert "mlacompile.attention" not in text[4]


def test_first_call_verification_accepts_what_is_right() -> None:
    counting = Counting()
    module, (x, position, mask) = layer(), arguments()
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, backend=counting, options={"verify": "first-call"})
    for _ in range(2):
        with torch.inference_mode():
            assert close(compiled(x, position, mask), twin(x, position, mask))
    for got, want in zip(module.buffers(), twin.buffers(), strict=True):
        assert close(got, want), "the original ran on copies"


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda out, args: out * 1.01, "output 0 of the compiled graph differs"),
        (lambda out, args: out * float("nan"), "output 0 of the compiled graph differs"),
        (lambda out, args: [args.mul_(1.5), out][1], "input . of the compiled graph differs"),
    ],
    ids=["value", "nan", "cache"],
)
def test_first_call_verification_catches_what_is_wrong(
    wrong: Callable[..., Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = compiler.compile_rest

    def dishonest(gm: Any, inputs: Any, options: Any, mode: Any) -> Callable[..., Any]:
        run = honest(gm, inputs, options, mode)
        return lambda *args: [wrong(out, module.cache_c) for out in run(*args)]

    monkeypatch.setattr(compiler, "compile_rest", dishonest)
    module = layer()
    compiled = torch.compile(module, backend=backend, options=EAGER | {"verify": "first-call"})
    with pytest.raises(VerificationError, match=expected):
        compiled(*arguments())


def test_invisible_rows_may_hold_anything() -> None:
    """NaN and infinities under the mask, in a spelling that hands the mask to attention."""
    x, position, mask = arguments(2)
    mask = mask.clone()
    mask[0, ..., :3] = False
    mask[1, ..., 5:7] = False
    outputs = []
    for poison in (None, float("nan"), float("inf")):
        module = layer()
        if poison is not None:
            for cache in (module.cache_c, module.cache_pe):
                cache[0, :3] = poison
                cache[1, 5:7] = poison
        outputs.append(torch.compile(module, backend=backend, options={"rest": "eager"})(x, position, mask))
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def sites(report: mlacompile.Report) -> list[tuple[Any, ...]]:
    """What has to be the same wherever a graph is looked at; kernels depend on the device."""
    return [(s.status, s.source, s.geometry, s.form, s.queries, s.context, s.kv_layout) for s in report.sites]


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_explain_sees_what_compiling_sees(family: str) -> None:
    model = tiny_model(family, num_hidden_layers=2)
    tokens = random_tokens(model.config, 2, 1)
    cache = static_cache(model, batch=2, max_cache_len=24, length=9, random=True)
    before = [(a.keys.clone(), a.values.clone(), a.cumulative_length.clone()) for a in cache.layers]
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # reading one would show
    report = explain(model, input_ids=tokens, past_key_values=cache)
    for old, now in zip(before, cache.layers, strict=True):
        for a, b in zip(old, (now.keys, now.values, now.cumulative_length), strict=True):
            assert torch.equal(a, b)
    assert last_report().sites == (), "explaining is not compiling"
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, options=EAGER)(input_ids=tokens, past_key_values=cache)
    assert sites(report) == sites(last_report())
    assert len(report.sites) == 2

    hollow = tiny_model(family, device="meta", num_hidden_layers=2)
    cache = static_cache(hollow, batch=2, max_cache_len=24, length=9)
    again = explain(hollow, input_ids=tokens.to("meta"), past_key_values=cache)
    assert sites(again) == sites(report)


def test_explain_can_be_asked_often() -> None:
    module, inputs = layer(), arguments()
    with torch._dynamo.config.patch(recompile_limit=2):  # 8 by default: Dynamo gives up on the version after that
        for _ in range(4):
            assert explain(module, *inputs).absorbed == 1
        torch.compile(module, backend=backend, options=EAGER)(*inputs)
        assert last_report().absorbed == 1


def test_the_report_covers_every_frame_and_forgets_on_reset() -> None:
    first, second = layer(0), layer(1, Spelling(cache="fused", heads=3))

    def other(*inputs: Any) -> Tensor:
        return second(*inputs)

    torch.compile(first, backend=backend, options=EAGER)(*arguments())
    torch.compile(other, backend=backend, options=EAGER)(*arguments())
    assert last_report().absorbed == 2
    torch.compile(first, backend=backend, options=EAGER)(*arguments(9))  # the same frame again, now as prefill
    report = last_report()
    assert (report.absorbed, report.expanded) == (1, 1)
    torch._dynamo.reset()
    assert last_report().sites == ()


def test_a_graph_without_attention_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False)
    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(module, backend=backend)(x), torch.compile(module)(x))
    assert last_report().sites == ()
