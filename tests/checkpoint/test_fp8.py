"""Checkpoints in DeepSeek's FP8 format: what is in them, the way back, and everything that can be wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mlacompile import quantize
from mlacompile.checkpoint import CheckpointReader, fp8
from mlacompile.cli import app
from mlacompile.errors import CheckpointError, UnsupportedInputError
from mlacompile.ops.fp8_linear import fp8_dequantize_weight, fp8_quantize_weight
from mlacompile.testing.models import random_tokens, tiny_model
from tests.ops.test_fp8_linear import whole
from tests.ops.test_fp8_quantize import HALF_STEP, SMALLEST

E4M3 = torch.float8_e4m3fn
#: All widths of linear layers are multiples of 128, but for kv_a's 144 rows.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 48,
    "v_head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_model("deepseek_v3", dtype=torch.bfloat16, **SIZES).save_pretrained(folder, max_shard_size="200KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("old")
    return folder


@pytest.fixture(scope="module")
def result(source: Path) -> Path:
    out = source.parent / "fp8"
    quantize(source, out, max_shard_bytes=200_000)
    return out


def edited(folder: Path, to: Path, change: Any) -> Path:
    """A copy in one file, its tensors and configuration changed by ``change(tensors, config)``."""
    reader = CheckpointReader(folder)
    tensors = {name: reader.read(name) for name in reader.tensors}
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    to.mkdir()
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_linear_layers_and_experts_are_in_fp8_and_nothing_else_is(source: Path, result: Path) -> None:
    before, after = CheckpointReader(source), CheckpointReader(result)
    config = json.loads((result / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8"
    assert config["weight_block_size"] == [128, 128]
    partial = [f"model.layers.{i}.self_attn.kv_a_proj_with_mqa" for i in range(2)]
    assert config["modules_to_not_convert"] == ["lm_head", *partial]
    quantized = {n.removesuffix(".weight") for n in after.tensors if after.spec(n).dtype is E4M3}
    assert quantized == {n.removesuffix(f".{fp8.SCALE}") for n in after.tensors if n.endswith(fp8.SCALE)}
    ends = {name.split(".")[-1] for name in quantized}
    assert ends == {"q_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(quantized) == 2 * 4 + 3 + 3 * 4 + 3
    for name in before.tensors:
        if name.removesuffix(".weight") not in quantized:
            assert torch.equal(before.read(name), after.read(name)), name
    assert (result / "tokenizer.json").is_file()
    assert not (result / "pytorch_model.bin").exists()
    assert len(list(result.glob("*.safetensors"))) > 2


def test_weights_are_what_the_op_makes_and_within_half_a_step(source: Path, result: Path) -> None:
    before, after = CheckpointReader(source), CheckpointReader(result)
    for name in after.tensors:
        if after.spec(name).dtype is not E4M3:
            continue
        weight, q = before.read(name), after.read(name)
        descale = after.read(name.removesuffix("weight") + fp8.SCALE)
        want = fp8_quantize_weight(weight)
        assert torch.equal(q.view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(descale, want[1])
        scales, size = whole(descale, weight.shape, 128), weight.double().abs()
        bound = torch.maximum(HALF_STEP[E4M3] * size, SMALLEST[E4M3] * scales / 2) * (1 + 2.0**-20)
        assert bool(((weight.double() - q.double() * scales).abs() <= bound).all())


def test_there_and_back_loads_in_transformers(source: Path, result: Path, tmp_path: Path) -> None:
    back = fp8.dequantize(result, tmp_path / "back")
    before, after, scaled = (CheckpointReader(folder) for folder in (source, back.folder, result))
    assert set(before.tensors) == set(after.tensors)
    for name in after.tensors:
        assert after.spec(name) == before.spec(name)
        if scaled.spec(name).dtype is E4M3:
            scale = scaled.read(name.removesuffix("weight") + fp8.SCALE)
            assert torch.equal(after.read(name), fp8_dequantize_weight(scaled.read(name), scale, torch.bfloat16))
    assert "quantization_config" not in json.loads((back.folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(back.folder)
    assert model.dtype is torch.bfloat16
    with torch.no_grad():
        assert model(random_tokens(model.config, 1, 5)).logits.isfinite().all()


def test_transformers_finds_every_tensor_it_wants_in_fp8(result: Path) -> None:
    """Its own modules for such a checkpoint, without memory: every parameter is there, in its shape and dtype."""
    from transformers import AutoConfig
    from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = AutoConfig.from_pretrained(result)
    told = FineGrainedFP8Config(**config.quantization_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        replace_with_fp8_linear(model, told.modules_to_not_convert, told, pre_quantized=True)
    reader = CheckpointReader(result)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    assert len(linears) == 2 * 4 + 3 + 3
    for path, module in linears.items():
        for name in ("weight", fp8.SCALE):
            spec, parameter = reader.spec(f"{path}.{name}"), getattr(module, name)
            assert (spec.dtype, spec.shape) == (parameter.dtype, tuple(parameter.shape))


def test_transformers_reads_what_we_read(result: Path, tmp_path: Path) -> None:
    """Its own loader, told to dequantize, against ours."""
    pytest.importorskip("accelerate", reason="transformers loads quantized checkpoints with accelerate only")
    from transformers.utils.quantization_config import FineGrainedFP8Config

    fp8.dequantize(result, tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(result, quantization_config=FineGrainedFP8Config(dequantize=True))
    wanted = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_an_interrupted_run_goes_on_and_ends_the_same(source: Path, result: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def after_a_while(done: int, total: int) -> None:
        if done > total / 2:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(source, out, max_shard_bytes=200_000, advance=after_a_while)
    assert not out.exists()
    finished = list((tmp_path / "out.partial" / "files").glob("*.safetensors"))
    assert finished
    times = {file.name: file.stat().st_mtime_ns for file in finished}
    quantize(source, out, max_shard_bytes=200_000)
    for file in sorted(result.iterdir()):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(source, out)


def test_layers_can_be_kept_and_partial_blocks_taken(source: Path, tmp_path: Path) -> None:
    done = quantize(source, tmp_path / "a", keep=["*.kv_b_proj", "*.experts.*"], partial_blocks=True)
    assert done.quantized == 2 * 4 + 3 + 3
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    kept = config["modules_to_not_convert"]
    assert kept == ["lm_head", "model.layers.0.self_attn.kv_b_proj", "model.layers.1.mlp.experts", kept[3]]
    reader = CheckpointReader(tmp_path / "a")
    assert reader.spec(f"model.layers.0.self_attn.kv_a_proj_with_mqa.{fp8.SCALE}").shape == (2, 1)
    with pytest.raises(UnsupportedInputError, match=r"keep all of them \('\*.experts.\*'\) or none"):
        quantize(source, tmp_path / "b", keep=["*.experts.1.up_proj"])
    with pytest.raises(CheckpointError, match="no weight in it"):
        quantize(source, tmp_path / "b", keep=["*"])
    assert not (tmp_path / "b").exists()


def test_exponents_as_scales_are_read_as_exponents(result: Path, tmp_path: Path) -> None:
    def powers(tensors: dict[str, torch.Tensor], config: Any, as_bytes: bool) -> None:
        for name in list(tensors):
            if name.endswith(fp8.SCALE):
                exponents = torch.exp2(torch.ceil(torch.log2(tensors[name]))).to(torch.float8_e8m0fnu)
                tensors[name] = exponents.view(torch.uint8) if as_bytes else exponents

    def with_format(tensors: dict[str, torch.Tensor], config: Any) -> None:
        powers(tensors, config, as_bytes=True)
        config["quantization_config"]["scale_fmt"] = "ue8m0"

    e8m0 = edited(result, tmp_path / "e8m0", lambda t, c: powers(t, c, as_bytes=False))
    told = edited(result, tmp_path / "told", with_format)
    untold = edited(result, tmp_path / "untold", lambda t, c: powers(t, c, as_bytes=True))
    fp8.dequantize(e8m0, tmp_path / "a")
    fp8.dequantize(told, tmp_path / "b")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'model.*weight_scale_inv' is torch.uint8"):
        fp8.dequantize(untold, tmp_path / "c")


LAYER = "model.layers.0.self_attn.q_b_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, c: t.pop(f"{LAYER}.{fp8.SCALE}"),
            rf"model.safetensors: tensor '{LAYER}.weight' is in FP8, and .* missing",
        ),
        (
            lambda t, c: t.update({f"{LAYER}.{fp8.SCALE}": torch.ones(1, 3)}),
            rf"'{LAYER}.{fp8.SCALE}' has shape \[1, 3\]",
        ),
        (lambda t, c: t.update({f"lm_head.{fp8.SCALE}": torch.ones(1, 3)}), "scales nothing"),
        (lambda t, c: t[f"{LAYER}.{fp8.SCALE}"].fill_(torch.inf), rf"tensor '{LAYER}.{fp8.SCALE}' is inf at \[0, 0\]"),
        (lambda t, c: c["quantization_config"].update(weight_block_size=[64, 64]), r"weight_block_size \[64, 64\]"),
        (lambda t, c: c.pop("quantization_config"), "got quant_method None"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(result: Path, tmp_path: Path, change: Any, message: str) -> None:
    damaged = edited(result, tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message):
        fp8.dequantize(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantized_is_refused(source: Path, result: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantized already.*--dequantize"):
        quantize(result, tmp_path / "out")
    bad = edited(source, tmp_path / "bad", lambda t, c: t[f"{LAYER}.weight"][3].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=rf"'{LAYER}.weight' is nan at \[3, 0\]"):
        quantize(bad, tmp_path / "out")
    (bad / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        quantize(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zero_blocks_survive(source: Path, tmp_path: Path) -> None:
    empty = edited(source, tmp_path / "empty", lambda t, c: t[f"{LAYER}.weight"].zero_())
    quantize(empty, tmp_path / "out")
    scale = CheckpointReader(tmp_path / "out").read(f"{LAYER}.{fp8.SCALE}")
    assert torch.equal(scale, torch.ones_like(scale))
    fp8.dequantize(tmp_path / "out", tmp_path / "back")
    assert not CheckpointReader(tmp_path / "back").read(f"{LAYER}.weight").any()


def test_rows_that_would_become_zero_beside_large_ones_are_refused(source: Path, tmp_path: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor], config: Any) -> None:
        tensors[f"{LAYER}.weight"][5:7] *= 2.0**-40

    small = edited(source, tmp_path / "small", shrink)
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight': 2 rows, the first of them 5, would all become zero"):
        quantize(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(small, tmp_path / "kept", keep=[LAYER])
    kept = CheckpointReader(tmp_path / "kept").read(f"{LAYER}.weight")
    assert torch.equal(kept, CheckpointReader(small).read(f"{LAYER}.weight"))


def test_the_command(source: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["quantize", str(source), "--out", str(tmp_path / "q"), "--keep", "*.o_proj"])
    assert done.exit_code == 0, done.output
    assert "weights in FP8" in done.output
    assert "model.layers.0.self_attn.o_proj" in done.output
    done = run(app, ["quantize", str(tmp_path / "q"), "--out", str(tmp_path / "d"), "--dequantize"])
    assert done.exit_code == 0, done.output
    assert set(CheckpointReader(tmp_path / "d").tensors) == set(CheckpointReader(source).tensors)
