"""What cannot be converted is refused before any work: with file and tensor, or the reason and the nearest thing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlacompile.convert import convert
from mlacompile.convert.families import FAMILIES, describe
from mlacompile.convert.source import open_source
from mlacompile.errors import CheckpointError, MLACompileError, UnsupportedInputError
from tests.convert.conftest import SIZES, build

Save = Callable[..., Path]
Q = "model.layers.1.self_attn.q_proj.weight"


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def refused(source: Path, error: type[MLACompileError], message: str, **options: Any) -> None:
    """Refused, and nothing is left anywhere."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(error, match=message):
        convert(source, source.parent / "out", **options)
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("deepseek_v3", "has latent attention already"),
        ("minicpm3", "has latent attention already"),
        ("gpt2", "does not convert: it has no rotary embedding"),
        ("mixtral", "does not convert: its experts are not carried over; Mistral converts"),
        ("qwen3_moe", "the dense Qwen3 models convert"),
        ("mamba", "does not convert; these convert: llama"),
        ("brand_new", r"these convert: llama \(Llama 1 to 3, SmolLM, SmolLM2\)"),
        (None, "model_type None does not convert"),
        (["llama"], "does not convert"),
    ],
)
def test_other_architectures(save: Save, family: Any, message: str) -> None:
    refused(edit_config(save(), model_type=family), UnsupportedInputError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 64}, "has latent attention already"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "change with the length"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3|rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "in part"),
        ({"num_key_value_heads": 3}, "4 query heads, 3 key and value heads"),
        ({"num_key_value_heads": 0}, "4 query heads, 0 key and value heads"),
        ({"head_dim": 15}, "even"),
        ({"hidden_size": "many"}, "cannot read this llama configuration"),
        ({"hidden_size": 128}, r"embed_tokens.weight' has shape \[96, 64\]; the configuration says \[96, 128\]"),
        ({"num_key_value_heads": 4}, r"k_proj.weight' has shape \[32, 64\]; the configuration says \[64, 64\]"),
        ({"num_hidden_layers": 3}, r"tensor 'model.layers.2.self_attn.q_proj.weight' is missing"),
        ({"num_hidden_layers": 1}, r"'model.layers.1.\S+' belongs to no llama model .* would be lost"),
        ({"attention_bias": True}, r"'model.layers.0.self_attn.q_proj.bias' is missing"),
        ({"model_type": "qwen3"}, r"q_norm.weight' is missing"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from the embedding"),
    ],
)
def test_configurations(save: Save, changes: dict[str, Any], message: str) -> None:
    refused(edit_config(save(), **changes), MLACompileError, message)


def test_both_directions_of_attention(save: Save) -> None:
    source = edit_config(save("gemma2", head_dim=16), use_bidirectional_attention=True)
    refused(source, UnsupportedInputError, "only causal models convert")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "as JSON"), ("[1]", "expected a JSON object, got list"), ("", "JSON")]
)
def test_damaged_configuration(save: Save, text: str, message: str) -> None:
    source = save()
    (source / "config.json").write_text(text)
    refused(source, UnsupportedInputError, message)


def test_missing_and_left_over_tensors(save: Save) -> None:
    source = edit_weights(save(), lambda tensors: tensors.pop(Q))
    refused(source, CheckpointError, f"tensor '{Q}' is missing")
    source = edit_weights(save(), lambda tensors: tensors.update({"model.vision.weight": torch.ones(3)}))
    refused(source, CheckpointError, r"model\.safetensors: tensor 'model.vision.weight' belongs to no llama model")
    source = edit_weights(save(), lambda tensors: tensors.pop("lm_head.weight"))
    refused(source, CheckpointError, "tensor 'lm_head.weight' is missing")
    source = edit_weights(save(), lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}))
    refused(source, CheckpointError, f"tensor '{Q}' has dtype torch.int8; .* dequantize the model first")


def test_nan_weights_are_found_wherever_they_are(save: Save, tmp_path: Path) -> None:
    """In attention, which is rewritten, and in the rest, which is copied. Nothing is ever taken for whole."""
    for name in (Q, "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        source = edit_weights(save(), lambda tensors, name=name: tensors[name].view(-1)[3:4].fill_(torch.nan))
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' is nan at \[(0, )?3\]"):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_damaged_shards(save: Save) -> None:
    source = save(shard="20KB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 3
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    refused(source, CheckpointError, rf"{shards[1].name}: truncated: tensor '\S+' needs")
    shards[1].write_bytes(whole[:20] + b"\0\0\0" + whole[23:])
    refused(source, CheckpointError, rf"{shards[1].name}: damaged safetensors header")
    shards[1].unlink()
    refused(source, CheckpointError, rf"{shards[1].name}: missing; .* holds 'model")


def test_places(save: Save, tmp_path: Path) -> None:
    source = save()
    refused(tmp_path / "nowhere", MLACompileError, "no such file or folder")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "there")
    with pytest.raises(CheckpointError, match="there is no folder"):
        convert(source, tmp_path / "no" / "where")
    refused(source, UnsupportedInputError, "target 'onnx': expected one of transformers, vllm", target="onnx")
    refused(source, UnsupportedInputError, "dtype 'int4': expected one of auto", dtype="int4")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, CheckpointError, "is a pickle, which can run any code")


def test_existing_folder_is_refused_before_the_source_is_read(save: Save, tmp_path: Path) -> None:
    source = edit_weights(save(), lambda tensors: tensors[Q].fill_(torch.nan))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "out")


def test_tied_and_stored_output_projection(save: Save, tmp_path: Path) -> None:
    """A copy of the embedding is dropped; buffers of old checkpoints are too."""
    source = save(tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    convert(edit_weights(source, add), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_weights_of_a_bare_model(save: Save, tmp_path: Path) -> None:
    """Saved without the language model around it, names lack their first part."""
    build("llama", tie_word_embeddings=True).model.save_pretrained(tmp_path / "bare")
    edit_config(tmp_path / "bare", architectures=["LlamaForCausalLM"])
    convert(tmp_path / "bare", tmp_path / "a")
    convert(save(tie_word_embeddings=True), tmp_path / "b")
    file = "model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_file_with_a_configuration(save: Save, tmp_path: Path) -> None:
    source = save()
    file, config = tmp_path / "llama.safetensors", tmp_path / "elsewhere.json"
    (source / "model.safetensors").rename(file)
    (source / "config.json").rename(config)
    convert(file, tmp_path / "out", config=config)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    with pytest.raises(UnsupportedInputError, match=r"no config\.json there"):
        convert(file, tmp_path / "out2", config=tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("family", "special", "head_dim", "said"),
    [
        ("llama", {"vocab_size": 128256, "head_dim": 64}, 64, "heads of width 64, usual at hidden size 64"),
        ("qwen2", {"head_dim": 64}, 64, "qwen2: 2 layers, 4 query heads and 2 key heads of width 64"),
        ("qwen3", {"head_dim": 24}, 24, "qwen3: 2 layers, 4 query heads"),
        ("llama", {"head_dim": 32}, 32, "heads of width 32"),
    ],
)
def test_geometry_is_concluded_from_shapes_and_said(
    save: Save, tmp_path: Path, family: str, special: dict[str, Any], head_dim: int, said: str
) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {**heads, **special}
    if family == "qwen2":
        special |= {"hidden_size": 256}
        special.pop("head_dim")
    elif family == "llama" and head_dim == 32:
        special |= {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96}
    file = tmp_path / "weights.safetensors"
    (save(family, **special) / "model.safetensors").rename(file)
    heard: list[str] = []
    report = convert(file, tmp_path / "out", say=heard.append).report
    assert report["source"]["head_dim"] == head_dim
    assert report["source"]["model_type"] == family
    assert any(said in text for text in heard), heard
    assert any("rope_theta" in text for text in report["source"]["concluded"])


def test_geometry_can_be_told(save: Save, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    (save(head_dim=16) / "model.safetensors").rename(file)
    model = open_source(file, head_dim=8, rope_theta=123.0).model
    assert (model.heads, model.groups, model.head_dim) == (8, 4, 8)
    assert model.inv_freq[1].item() == pytest.approx(123.0**-0.25)
    with pytest.raises(UnsupportedInputError, match="heads of width 12 do not fit 64 query and 32 key rows"):
        open_source(file, head_dim=12)


def test_bare_weights_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"wte.weight": torch.ones(3, 4)}, file)
    with pytest.raises(UnsupportedInputError, match=r"need Llama's names: 'model\.embed_tokens.weight' is not there"):
        convert(file, tmp_path / "out")


def test_a_bare_gemma_is_not_guessed(save: Save, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    (save("gemma2", head_dim=16) / "model.safetensors").rename(file)
    with pytest.raises(UnsupportedInputError, match="give --config"):
        convert(file, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_described_from_the_least_that_a_configuration_says(family: str) -> None:
    """Old files leave most things to defaults, and call the rotary table by its old names."""
    model = describe({"model_type": family, **SIZES, "rope_theta": 777.0, "torch_dtype": "bfloat16"})
    assert model.inv_freq[0] == 1.0
    assert model.inv_freq[1].item() == pytest.approx(777.0 ** (-2 / model.head_dim))
    scaled = describe(
        {"model_type": family, **SIZES, "rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    )
    torch.testing.assert_close(scaled.inv_freq * 4, model.inv_freq)
