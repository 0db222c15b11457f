"""LatentCache in FP8: the bytes are what they are said to be, reads are within half a step, and turns do not add up."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CompileConfig, StaticCache

import mlacompile.compiler as compiler
import mlacompile.ops.mla_decode_placed as placed_module
from mlacompile import LatentCache, backend, last_report
from mlacompile.cache.storage import Storage
from mlacompile.errors import UnsupportedInputError
from mlacompile.ops.fp8_quantize import fp8_dequantize, fp8_quantize
from mlacompile.testing.models import random_tokens, tiny_config, tiny_model
from mlacompile.testing.registration import ensure_registered
from tests.cache.test_latent_cache import EAGER, LENGTH, decode, full_by_one, generate, padding, relative, small
from tests.ops.test_fp8_quantize import allowed

#: What is asked for, and the bytes of a token at the tiny models' rank 64 and rope 16, and at 512 and 64.
KINDS: list[tuple[dict[str, str], int, int]] = [
    ({"dtype": "fp8_e4m3"}, 112, 656),
    ({"dtype": "fp8_e4m3", "scales": "token"}, 100, 644),
    ({"dtype": "fp8_e5m2"}, 112, 656),
    ({"dtype": "fp8_e5m2", "scales": "token", "rope_dtype": "fp16"}, 100, 644),
    ({"dtype": "fp8_e4m3", "rope_dtype": "fp8_e4m3"}, 96, 608),
    ({"dtype": "fp8_e4m3", "scales": "token", "rope_dtype": "fp8_e4m3"}, 88, 584),
]
SETTINGS = [k for k, _, _ in KINDS]


def store(kind: dict[str, str], rank: int, rope: int, compute: torch.dtype = torch.float32, tokens: int = 5) -> Any:
    return Storage.parse(**kind).allocate(2, tokens, rank, rope, compute=compute, device=torch.device("cpu"))


@pytest.mark.parametrize(("kind", "tiny", "large"), KINDS)
def test_a_token_takes_the_bytes_that_the_cache_says(kind: dict[str, str], tiny: int, large: int) -> None:
    assert LatentCache(tiny_config("deepseek_v3"), max_cache_len=8, **kind).bytes_per_token == 3 * tiny
    allocated = store(kind, 512, 64, tokens=7)
    assert allocated.layout.bytes_per_token == large
    assert sum(a.nbytes for a in allocated.arrays().values()) == 2 * 7 * large


def test_the_656_bytes_are_those_of_the_ds_layout() -> None:
    """Read with NumPy, by the published description: 512 e4m3, four float32 scales, 64 bf16."""
    cache = store({"dtype": "fp8_e4m3"}, 512, 64)
    c_kv, k_pe = torch.randn(2, 3, 512), torch.randn(2, 3, 64).bfloat16().float()
    cache.write(torch.tensor([1, 2, 3]), c_kv, k_pe)
    for b in range(2):
        for s in range(3):
            token = cache.bytes[b, 1 + s].numpy().tobytes()
            scales = np.frombuffer(token[512:528], dtype="<f4").astype(np.float64)
            rope = (np.frombuffer(token[528:], dtype="<u2").astype(np.uint32) << 16).view("<f4")
            assert np.array_equal(rope, k_pe[b, s].numpy())
            latent = np.array([e4m3(byte) for byte in token[:512]]).reshape(4, 128) * scales[:, None]
            descale = torch.tensor(scales)[None]
            error = (torch.tensor(latent).reshape(1, 512) - c_kv[b, s].double()).abs()
            assert bool((error <= allowed(c_kv[b, s][None], descale, 128, torch.float8_e4m3fn)).all())


def e4m3(byte: int) -> float:
    """OCP 8-bit floating point, E4M3: a sign, four bits of exponent with bias 7, three of mantissa."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if byte & 128 else size


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (64, 16), (200, 32), (65, 7)])
def test_what_is_written_is_what_the_op_quantizes(kind: dict[str, str], rank: int, rope: int) -> None:
    cache = store(kind, rank, rope)
    for array in cache.arrays().values():
        array.view(torch.uint8).fill_(255)  # NaN in every dtype: rows beside those written must not matter
    c_kv, k_pe = torch.randn(2, 2, rank), torch.randn(2, 2, rope)
    cache.write(torch.tensor([3, 1]), c_kv, k_pe)
    got = [x[:, [3, 1]] for x in cache.read()]
    fp8 = cache.fp8
    group = 128 if kind.get("scales") != "token" else rank
    assert torch.equal(got[0], fp8_dequantize(*fp8_quantize(c_kv, group, fp8), group, torch.float32))
    if cache.rope_dtype == fp8:
        assert torch.equal(got[1], fp8_dequantize(*fp8_quantize(k_pe, rope, fp8), rope, torch.float32))
    else:
        assert torch.equal(got[1], k_pe.to(cache.rope_dtype).float())
    assert cache.read()[0][:, [0, 2, 4]].isnan().all()


@pytest.mark.parametrize("kind", SETTINGS)
def test_outliers_of_1e4_stay_where_they_are(kind: dict[str, str]) -> None:
    """In the rotary key they cost the latent nothing; in the latent only the values that share their scale."""
    cache = store(kind, 512, 64)
    c_kv, k_pe = torch.randn(2, 3, 512), torch.randn(2, 3, 64)
    k_pe[0, 1, 3] = 1e4
    slots = torch.arange(3)
    cache.write(slots, c_kv, k_pe)
    undisturbed = cache.read()[0].clone()
    group = 128 if kind.get("scales") != "token" else 512
    fp8 = cache.fp8
    assert bool(
        ((undisturbed[:, :3] - c_kv).abs() <= allowed(c_kv, fp8_quantize(c_kv, group, fp8)[1], group, fp8)).all()
    )
    c_kv[0, 1, 200] = -1e4
    cache.write(slots, c_kv, k_pe)
    c, k = cache.read()
    changed = (c != undisturbed)[0, 1]
    assert changed.any()
    assert not (c != undisturbed)[1].any()
    if group == 128:
        assert not changed[:128].any()
        assert not changed[256:].any()
    half = 2.0**-4 if cache.rope_dtype == fp8 else 2.0**-9
    assert abs(float(k[0, 1, 3]) - 1e4) <= half * 1e4


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_layer_is_absorbed_on_its_bytes_and_equal_to_eager_with_the_same_cache(
    kind: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []
    lowered = compiler.compile_rest
    monkeypatch.setattr(compiler, "compile_rest", lambda gm, *rest: graphs.append(gm) or lowered(gm, *rest))
    model = small("deepseek_v3")
    want = decode(model, model, LatentCache(model.config, max_cache_len=LENGTH, **kind))
    compiled = torch.compile(model, backend=backend, options=EAGER, fullgraph=True)
    cache = LatentCache(model.config, max_cache_len=LENGTH, **kind)
    got = decode(model, compiled, cache)
    report = last_report()
    assert report.absorbed == 2, report
    assert relative(got, want) <= 1e-5
    exact = decode(model, model, StaticCache(model.config, max_cache_len=LENGTH))
    assert 1e-4 < relative(want, exact) < 0.2, "it is quantized, and not wildly"
    (layout,) = {s.kv_layout for s in report.sites}
    assert layout.bytes_per_token == cache.layout.bytes_per_token
    assert layout.scale_bytes == cache.layout.scale_bytes
    (graph,) = graphs
    reads_the_bytes_of_the_cache(graph, kind)


def reads_the_bytes_of_the_cache(graph: torch.fx.GraphModule, kind: dict[str, str]) -> None:
    """In the graph that is lowered nothing is dequantized, and no tensor of the cache's length is wider than it."""
    called = Counter(getattr(n.target, "__name__", str(n.target)) for n in graph.graph.nodes)
    assert not any("dequantize" in name for name in called)
    assert called["fp8_quantize_reference"] == 2 * (1 + kind.get("rope_dtype", "").startswith("fp8"))
    decodes = graph.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.mla_decode.default)
    assert len(decodes) == 2
    for node in decodes:
        c_kv, k_pe, descale = (node.args[i].meta["val"] for i in (2, 3, 8))
        assert c_kv.dtype == Storage.parse(**kind).dtype
        assert descale.dtype == torch.float32
        assert descale.shape[2] == 1 + (k_pe.dtype.itemsize == 1)
    views = {torch.ops.aten.view.dtype, torch.ops.aten.alias.default, torch.ops.aten.detach.default}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        written = node.op == "call_function" and node.target not in views
        if written and isinstance(value, torch.Tensor) and value.dtype == torch.float32 and LENGTH in value.shape[1:2]:
            assert value.shape[-1] <= 16, f"wider than rotary keys and factors: {node.format_node()}"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Latents and factors that compiled graphs hand to the kernel."""
    found: list[torch.Tensor] = []
    kernel = placed_module.mla_decode_cpu

    def spy(*tensors: torch.Tensor, **settings: Any) -> Any:
        found.extend((tensors[2], tensors[8]))
        return kernel(*tensors, **settings)

    monkeypatch.setattr(placed_module, "mla_decode_cpu", spy)
    return found


def test_inductor_hands_the_cache_itself_to_the_kernel_of_a_padded_batch(given: list[torch.Tensor]) -> None:
    model = small("deepseek_v3", num_hidden_layers=1)
    cache = LatentCache(model.config, max_cache_len=LENGTH, dtype="fp8_e4m3")
    decode(model, torch.compile(model, backend=backend), cache, steps=1)
    memory = cache.latent_layers[0].store.bytes.untyped_storage().data_ptr()
    assert {x.untyped_storage().data_ptr() for x in given} == {memory}


@pytest.mark.parametrize("name", ["ours", "stock"])
def test_through_inductor(name: str, given: list[torch.Tensor]) -> None:
    """Ours hands the cache itself to the kernel, neither a copy nor what it was dequantized to."""
    model = small("minicpm3", num_hidden_layers=1)
    kind = {"dtype": "fp8_e4m3"}
    want = decode(model, model, LatentCache(model.config, max_cache_len=LENGTH, **kind), padded=False)
    compiled = torch.compile(model, backend=backend if name == "ours" else "inductor", fullgraph=True)
    cache = LatentCache(model.config, max_cache_len=LENGTH, **kind)
    assert relative(decode(model, compiled, cache, padded=False), want) <= 1e-5
    memory = cache.latent_layers[0].store.bytes.untyped_storage().data_ptr()
    assert {x.untyped_storage().data_ptr() for x in given} == ({memory} if name == "ours" else set())
    full_by_one(cache, compiled, model, room=LENGTH - 10)


@pytest.mark.parametrize("kind", SETTINGS[:2])
def test_bytes_that_no_query_sees_may_be_anything(kind: dict[str, str]) -> None:
    model = small("deepseek_v3")
    compiled = torch.compile(model, backend=backend, options=EAGER)
    tokens = random_tokens(model.config, 2, 12)
    results = []
    for poison in (0, 127, 255):  # e4m3 zero and both NaNs
        cache = LatentCache(model.config, max_cache_len=LENGTH, **kind)
        with torch.no_grad():
            model(input_ids=tokens[:, :8], attention_mask=padding(), past_key_values=cache)
            for layer in cache.latent_layers:
                for array in layer.store.arrays().values():
                    array.view(torch.uint8)[:, 8:] = poison
                    array.view(torch.uint8)[0, :2] = poison
            steps = [
                compiled(input_ids=tokens[:, i : i + 1], attention_mask=padding(), past_key_values=cache).logits
                for i in range(8, 12)
            ]
        results.append(torch.stack(steps))
    assert torch.isfinite(results[0]).all()
    assert all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.parametrize("kind", SETTINGS[:2])
def test_ten_turns_leave_what_reading_everything_at_once_does(kind: dict[str, str]) -> None:
    """A cache whose scales drift, or that is quantized twice, is right in the first turn and wrong in the tenth."""
    model = tiny_model("deepseek_v3", num_hidden_layers=2)
    turns = torch.stack([random_tokens(model.config, 1, 6, seed=i)[0] for i in range(10)])
    talk, once = (LatentCache(model.config, max_cache_len=64, **kind) for _ in range(2))
    with torch.no_grad():
        got = [model(input_ids=turn[None], past_key_values=talk).logits for turn in turns]
        want = model(input_ids=turns.reshape(1, -1), past_key_values=once).logits.split(6, dim=1)
        exact = model(input_ids=turns.reshape(1, -1)).logits.split(6, dim=1)
    errors = [relative(a, b) for a, b in zip(got, exact, strict=True)]
    assert max(errors[5:]) <= 2 * max(errors[:5]), f"the error grows from turn to turn: {errors}"
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= 1e-5
    for one, other in zip(talk.latent_layers, once.latent_layers, strict=True):
        for a, b in zip(one.store.read(), other.store.read(), strict=True):
            assert relative(a, b) <= 2.0**-3, "no more than the neighbouring value of the type"


def test_generate_compiled_gives_the_tokens_of_eager() -> None:
    ensure_registered()
    model = small("deepseek_v3")
    cache = LatentCache(model.config, max_cache_len=LENGTH, dtype="fp8_e4m3")
    want = generate(model, past_key_values=cache)
    cache.reset()
    config = CompileConfig(backend="mlacompile", mode=None, options=EAGER)
    config._compile_all_devices = True
    assert torch.equal(generate(model, past_key_values=cache, compile_config=config), want)
    assert last_report().absorbed == 2


def test_a_value_that_is_not_finite_is_not_hidden() -> None:
    cache = store({"dtype": "fp8_e4m3"}, 512, 64)
    c_kv = torch.randn(2, 1, 512)
    c_kv[0, 0, 300] = torch.inf
    cache.write(torch.tensor([0]), c_kv, torch.zeros(2, 1, 64))
    bad = cache.read()[0][:, 0].isnan()
    assert bad[0, 256:384].all()
    assert int(bad.sum()) == 128


def test_errors_say_what_to_do() -> None:
    config = tiny_config("deepseek_v3")
    with pytest.raises(UnsupportedInputError, match="scales='row': expected one of 'block', 'token'"):
        LatentCache(config, max_cache_len=8, dtype="fp8_e4m3", scales="row")
    with pytest.raises(UnsupportedInputError, match="only an FP8 cache has scales"):
        LatentCache(config, max_cache_len=8, dtype="bf16", scales="token")
    with pytest.raises(UnsupportedInputError, match="expected the same FP8 type"):
        LatentCache(config, max_cache_len=8, dtype="fp8_e4m3", rope_dtype="fp8_e5m2")
    with pytest.raises(UnsupportedInputError, match="dtype='fp8': expected one of 'bf16'"):
        LatentCache(config, max_cache_len=8, dtype="fp8")
