"""Every family computes the same after conversion: as near to float64 as its source is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlacompile.checkpoint import CheckpointReader, CheckpointWriter, plan_shards
from mlacompile.convert import convert
from mlacompile.convert.form import GQALayer, MLALayer
from mlacompile.convert.lift import lift
from mlacompile.convert.plan import plan
from mlacompile.convert.source import open_source
from mlacompile.errors import UnsupportedInputError, VerificationError
from tests.convert.conftest import VARIANTS, build, contents, load

Save = Callable[..., Path]


def errors(source: Path, result: Path, *, length: int = 40, remote_code: bool = False) -> tuple[float, float]:
    """Errors of the logits of source and result in float32, against the source in float64.

    A table of frequencies is float32 in any case, and a stock class that takes a table divides once more, so that some
    frequencies come out as the next float. What such a step does to the source counts among its errors.
    """
    tokens = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(length))
    model = load(source, dtype=torch.float64)
    exact = model(input_ids=tokens).logits
    table = model.model.rotary_emb.inv_freq
    table.copy_(torch.nextafter(table, torch.zeros_like(table)))
    stepped = model(input_ids=tokens).logits
    found = [stepped, *(m(input_ids=tokens).logits for m in (load(source), load(result, remote_code=remote_code)))]
    of_step, of_source, of_result = ((logits - exact).abs().max().item() for logits in found)
    return max(of_step, of_source), of_result


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_logits(save: Save, tmp_path: Path, name: str) -> None:
    family, special = VARIANTS[name]
    source = save(family, **special)
    report = convert(source, tmp_path / "out").report
    own = report["result"]["trust_remote_code"]
    assert own == any(word in name for word in ("window", "qwen3", "gemma2", "MLP")), report["result"]["why_own_class"]
    if not own:
        assert report["result"]["model_type"] == "deepseek_v3"
        assert not list((tmp_path / "out").glob("*.py"))
    of_source, of_result = errors(source, tmp_path / "out", remote_code=own)
    assert of_result <= 4 * of_source
    # Long texts: the rounding of a rotary frequency grows with the position.
    of_source, of_result = errors(source, tmp_path / "out", length=500, remote_code=own)
    assert of_result <= 4 * of_source


@pytest.mark.parametrize("name", ["llama 3", "qwen2", "qwen3", "gemma2"])
def test_the_same_text(save: Save, tmp_path: Path, name: str) -> None:
    family, special = VARIANTS[name]
    source = save(family, **special)
    own = convert(source, tmp_path / "out").report["result"]["trust_remote_code"]
    tokens = torch.randint(3, 96, (2, 5), generator=torch.Generator().manual_seed(0))
    texts = [
        model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=40, do_sample=False)
        for model in (load(source), load(tmp_path / "out", remote_code=own))
    ]
    assert texts[0].equal(texts[1])


@pytest.mark.parametrize("name", ["llama 2", "llama 3", "qwen2"])
def test_bfloat16_weights_keep_their_bits(save: Save, tmp_path: Path, name: str) -> None:
    """Run in float32, a bfloat16 checkpoint is as exact as a float32 one: nothing was rounded on the way."""
    family, special = VARIANTS[name]
    source = save(family, dtype=torch.bfloat16, **special)
    convert(source, tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    assert {stored.spec.dtype for name, stored in reader.tensors.items() if "a_layernorm" not in name} == {
        torch.bfloat16
    }
    of_source, of_result = errors(source, tmp_path / "out")
    assert of_result <= 4 * of_source


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    half=st.integers(1, 9),
    hidden=st.integers(1, 20),
    nope=st.integers(0, 5),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_lifted_attention_is_attention(
    groups: int, per_group: int, half: int, hidden: int, nope: int, biased: bool, seed: int
) -> None:
    """In float64 and without any model around it."""
    torch.manual_seed(seed)
    heads, d = groups * per_group, 2 * half

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    layer = GQALayer(
        w_q=noise(heads, d, hidden),
        w_k=noise(groups, d, hidden),
        w_v=noise(groups, d, hidden),
        w_o=noise(hidden, heads, d),
        b_q=noise(heads, d) if biased else None,
        b_k=noise(groups, d) if biased else None,
        b_v=noise(groups, d) if biased else None,
        b_o=noise(hidden) if biased else None,
        inv_freq=torch.rand(half, dtype=torch.float64),
        scale=0.3,
    )
    x = noise(7, hidden)
    torch.testing.assert_close(latent_attention(lift(layer, nope=nope), x), grouped_attention(layer, x))


def grouped_attention(layer: GQALayer, x: torch.Tensor) -> torch.Tensor:
    """x [S, M], rotated halves, as Llama does."""
    q = torch.einsum("hdm,sm->hsd", layer.w_q, x) + (0 if layer.b_q is None else layer.b_q[:, None])
    k = torch.einsum("gdm,sm->gsd", layer.w_k, x) + (0 if layer.b_k is None else layer.b_k[:, None])
    v = torch.einsum("gdm,sm->gsd", layer.w_v, x) + (0 if layer.b_v is None else layer.b_v[:, None])
    angle = torch.arange(len(x))[:, None] * layer.inv_freq
    turn = torch.polar(torch.ones_like(angle), angle)
    half = len(layer.inv_freq)
    q_c, k_c = (torch.complex(t[..., :half], t[..., half:]) * turn for t in (q, k))
    repeat = len(q) // len(k)
    scores = (q_c @ k_c.conj().transpose(1, 2).repeat_interleave(repeat, 0)).real * layer.scale
    out = causal_softmax(scores) @ v.repeat_interleave(repeat, 0)
    return torch.einsum("mhd,hsd->sm", layer.w_o, out) + (0 if layer.b_o is None else layer.b_o)


def latent_attention(layer: MLALayer, x: torch.Tensor) -> torch.Tensor:
    """x [S, M], rotated neighbours, absorbed: scores are taken on the latent."""
    q = torch.einsum("hdm,sm->hsd", layer.w_q, x) + (0 if layer.b_q is None else layer.b_q[:, None])
    c_kv = x @ layer.w_dkv.T + (0 if layer.b_dkv is None else layer.b_dkv)
    k_pe = x @ layer.w_kr.T + (0 if layer.b_kr is None else layer.b_kr)
    nope = layer.w_uk.shape[1]
    angle = torch.arange(len(x))[:, None] * layer.inv_freq
    turn = torch.polar(torch.ones_like(angle), angle)
    q_c, k_c = (torch.complex(t[..., 0::2], t[..., 1::2]) * turn for t in (q[..., nope:], k_pe))
    scores = (q_c @ k_c.conj().T).real + torch.einsum("hsn,hnr,tr->hst", q[..., :nope], layer.w_uk, c_kv)
    out = torch.einsum("hst,tr,hvr->hsv", causal_softmax(scores * layer.scale), c_kv, layer.w_uv)
    return torch.einsum("mhv,hsv->sm", layer.w_o, out) + (0 if layer.b_o is None else layer.b_o)


def causal_softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_float16_becomes_float32_unless_told_otherwise(save: Save, tmp_path: Path) -> None:
    source = save("qwen2", dtype=torch.float16)
    said: list[str] = []
    report = convert(source, tmp_path / "out", say=said.append).report
    assert report["result"]["dtype"] == "float32"
    assert any("do not load the result in float16" in text for text in said)
    of_source, of_result = errors(source, tmp_path / "out")
    assert of_result <= 4 * of_source
    with pytest.raises(UnsupportedInputError, match="float16 has too few exponents"):
        convert(source, tmp_path / "half", dtype="float16")
    assert convert(source, tmp_path / "bf", dtype="bfloat16").report["result"]["dtype"] == "bfloat16"
    # The class of our own has no norm, and takes any dtype.
    windowed = save("mistral", to="windowed", dtype=torch.float16, sliding_window=8)
    assert convert(windowed, tmp_path / "own").report["result"]["dtype"] == "float16"


def test_a_checkpoint_that_an_engine_takes(save: Save, tmp_path: Path) -> None:
    """One epsilon, one default table, 256 + 64; and transformers reads the same file to the same logits."""
    source = save(num_key_value_heads=1, head_dim=64, rms_norm_eps=1e-5, tie_word_embeddings=True)
    convert(source, tmp_path / "out", target="vllm")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"], config["rms_norm_eps"]) == (256, 64, 1e-6)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    of_source, of_result = errors(source, tmp_path / "out")
    assert of_result <= 8 * of_source  # queries, embedding and outputs are scaled, and rounded by it


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({}, r"32 \+ 32 values .* 512 \+ 64"),
        ({"num_key_value_heads": 1}, "these are 16, with frequencies of a shorter table"),
        ({"num_key_value_heads": 1, "head_dim": 64, "attention_bias": True}, "no biases in attention"),
        ({"num_key_value_heads": 1, "head_dim": 64, "mlp_bias": True}, "MLPs with biases"),
    ],
)
def test_what_an_engine_does_not_take(save: Save, tmp_path: Path, special: dict[str, Any], message: str) -> None:
    source = save(**special)
    if not special:
        source = save(to="wide", num_key_value_heads=2, head_dim=64)
        message = r"128 \+ 128 values .* 512 \+ 64"
    with pytest.raises(UnsupportedInputError, match=message):
        convert(source, tmp_path / "out", target="vllm")
    assert not (tmp_path / "out.partial").exists()


def test_ranks_that_differ_get_our_class(save: Save, tmp_path: Path) -> None:
    """As compression leaves them: a latent cut layer by layer. Here the cut part is zero, so nothing changes."""
    model = build("llama")
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.weight.data[16 * (2 - i) :] = 0
    model.save_pretrained(tmp_path / "source")
    source = open_source(tmp_path / "source")
    layers = []
    for i, layer in enumerate(map(lift, source.attention())):
        rank = 16 * (2 - i)
        cut = {"w_dkv": layer.w_dkv[:rank], "w_uk": layer.w_uk[..., :rank], "w_uv": layer.w_uv[..., :rank]}
        layers.append(MLALayer(**{**vars(layer), **cut}))
    decided = plan(source, layers=layers)
    assert decided.needs_own_class == ["ranks that differ between layers"]
    from mlacompile.convert import own

    with CheckpointWriter(tmp_path / "out", fingerprint="") as writer:
        writer.write_tensors(plan_shards(decided.specs()), decided.produce)
        writer.write_json("config.json", decided.config())
        writer.write_bytes(*own.modeling_file(decided.model))
        writer.commit()
    of_source, of_result = errors(tmp_path / "source", tmp_path / "out", remote_code=True)
    assert of_result <= 4 * of_source


def test_check_says_how_near_it_is(save: Save, tmp_path: Path) -> None:
    found = convert(save(), tmp_path / "out", check_result=True).report["check"]
    assert found["lossless"]
    assert found["same_text"]
    assert found["same_argmax"] == 1.0
    assert 0 < found["max_error"] < 1e-4 * found["max_logit"]
    assert len(found["continuations"]) == 2


def test_a_wrong_conversion_is_not_kept(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlacompile.convert import plan as module

    monkeypatch.setattr(module, "lift", lambda layer: lift(GQALayer(**{**vars(layer), "w_k": layer.w_k.flip(0)})))
    with pytest.raises(VerificationError, match="more than rounding"):
        convert(save(), tmp_path / "out", check_result=True)
    assert not (tmp_path / "out").exists()


def test_deterministic(save: Save, tmp_path: Path) -> None:
    source = save(shard="20KB")
    for name in ("a", "b"):
        convert(source, tmp_path / name, max_shard_bytes=30_000)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
