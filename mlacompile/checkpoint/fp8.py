"""A checkpoint in DeepSeek's FP8 format, and back: one tensor at a time, never half-written, taken up where it stopped.

    NAME.weight            e4m3 [N, K]
    NAME.weight_scale_inv  float32 [⌈N / 128⌉, ⌈K / 128⌉], multiplies on read
    config.json            quantization_config: {"quant_method": "fp8", "weight_block_size": [128, 128], …}

DeepSeek-V3 and R1 are published in it; transformers and serving engines load it as it is.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mlacompile
from mlacompile.checkpoint.reader import CheckpointReader
from mlacompile.checkpoint.tensors import TensorSpec
from mlacompile.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter, plan_shards
from mlacompile.errors import CheckpointError
from mlacompile.geometry import SCALE_GROUP
from mlacompile.ops.fp8_linear import (
    E4M3,
    block_grid,
    fp8_dequantize_weight_reference,
    fp8_quantize_weight_reference,
    lost_rows,
)

SCALE = "weight_scale_inv"
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
#: Not taken over: weights and their index are written anew, and what is written for other programs would be wrong.
_NOT_COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.onnx",
    ".*",
)


@dataclass(frozen=True)
class Quantization:
    """What was written: where, how many weights are in FP8, which linear layers are not, and bytes before and after."""

    folder: Path
    quantized: int
    kept: tuple[str, ...]
    bytes_before: int
    bytes_after: int


@dataclass
class _Source:
    """A checkpoint and its configuration."""

    weights: CheckpointReader
    config: dict[str, Any]
    recent: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> _Source:
        weights = CheckpointReader(folder)
        file = weights.folder / "config.json"
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: cannot be read: {error}; a checkpoint in FP8 is nothing without it"
            ) from error
        return cls(weights, config)

    def file_of(self, name: str) -> Path:
        return self.weights.tensors[name].file

    def scale_of(self, weight: str) -> str:
        return weight.removesuffix("weight") + SCALE


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    keep: Iterable[str] = (),
    partial_blocks: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Quantization:
    """Write ``source`` with the weights of its linear layers and experts in FP8.

    Norms, tables, routers and the output head stay as they are. A run that was interrupted goes on where it stopped
    when it is called again with the same arguments.

    Args:
        source: a folder in Hugging Face's layout. out: the folder to make; it must not exist.
        keep: patterns (``*.kv_b_proj``) of layers that stay as they are, besides.
        partial_blocks: quantize weights too that 128 × 128 does not divide, as DeepSeek does. transformers (5.23) reads
            those right on a GPU, but when it dequantizes (on a CPU, say) it takes the blocks to be of another size.
        max_shard_bytes: largest shard. say: told what is worth knowing. advance: told bytes written, of how many.
    Raises:
        CheckpointError: the source is damaged, in FP8 already, or has a value that is not finite; ``out`` exists or
            cannot be written; a row of a weight would be lost beside far larger ones. Names file and tensor.
        UnsupportedInputError: transformers is missing or does not know the model.
    """
    from mlacompile.integrations.fp8_modules import Modules

    opened = _Source.open(source)
    _refuse_quantized(opened)
    modules, patterns = Modules(opened.weights.folder), tuple(keep)

    def taken(spec: TensorSpec) -> bool:
        path = spec.name.removesuffix(".weight")
        return (
            modules.wants_fp8(spec.name)
            and len(spec.shape) == 2
            and spec.dtype in _WIDE
            and (partial_blocks or not any(size % SCALE_GROUP for size in spec.shape))
            and not any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        )

    stored = [tensor.spec for tensor in opened.weights.tensors.values()]
    chosen = {spec.name for spec in stored if taken(spec)}
    if not chosen:
        raise CheckpointError(f"{source}: no weight in it is one that would be quantized")
    kept = sorted(modules.not_in(chosen, opened.weights.tensors))
    say(f"{len(chosen)} weights in FP8; {len(kept)} linear layers stay as they are: {', '.join(kept) or 'none'}")
    specs = [new for spec in stored for new in (_scaled(spec) if spec.name in chosen else [spec])]
    config = {**opened.config, "quantization_config": _description(kept)}

    def produce(spec: TensorSpec) -> Tensor:
        weight = spec.name.removesuffix(SCALE) + "weight" if spec.name.endswith(SCALE) else spec.name
        if weight not in chosen:
            return opened.weights.read(spec.name)
        if spec.name not in opened.recent:  # a weight and its scales are asked for one after the other
            wide = opened.weights.read(weight)
            q, descale = fp8_quantize_weight_reference(wide)
            _check_rows_live(opened.file_of(weight), weight, wide, q)
            opened.recent = {weight: q, opened.scale_of(weight): descale}
        return opened.recent.pop(spec.name)

    _write(
        opened,
        out,
        specs,
        config,
        produce,
        max_shard_bytes,
        {"keep": patterns, "partial_blocks": partial_blocks},
        advance,
    )
    return Quantization(Path(out), len(chosen), tuple(kept), _bytes(stored), _bytes(specs))


def dequantize(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Quantization:
    """Write a checkpoint in DeepSeek's FP8 format with all weights in ``dtype``.

    Arguments and errors as for :func:`quantize`. Besides, CheckpointError: a weight in FP8 without ``weight_scale_inv``
    or the other way round, scales of the wrong shape, or in bytes that the configuration does not call exponents.
    """
    opened = _Source.open(source)
    _check_blocks(opened)
    stored = [tensor.spec for tensor in opened.weights.tensors.values()]
    chosen = {spec.name for spec in stored if spec.dtype == E4M3 and spec.name.endswith(".weight")}
    scales = {opened.scale_of(name) for name in chosen}
    _check_pairs(opened, stored, chosen, scales)
    say(f"{len(chosen)} weights become {str(dtype).removeprefix('torch.')}")
    specs = [
        TensorSpec(spec.name, dtype, spec.shape) if spec.name in chosen else spec
        for spec in stored
        if spec.name not in scales
    ]
    config = {key: value for key, value in opened.config.items() if key != "quantization_config"}
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")

    def produce(spec: TensorSpec) -> Tensor:
        tensor = opened.weights.read(spec.name)
        if spec.name not in chosen:
            return tensor
        return fp8_dequantize_weight_reference(tensor, _read_scale(opened, opened.scale_of(spec.name)), dtype)

    _write(opened, out, specs, config, produce, max_shard_bytes, {"dtype": str(dtype)}, advance)
    return Quantization(Path(out), 0, (), _bytes(stored), _bytes(specs))


def _check_rows_live(file: Path, name: str, wide: Tensor, q: Tensor) -> None:
    lost = lost_rows(wide, q)
    if len(lost):
        path = name.removesuffix(".weight")
        raise CheckpointError(
            f"{file}: tensor {name!r}: {len(lost)} rows, the first of them {int(lost[0])}, would all become zero: they "
            f"share FP8 scales with rows that are far larger. Leave this weight as it is (--keep {path!r} or a pattern)"
        )


def _scaled(spec: TensorSpec) -> list[TensorSpec]:
    rows, columns = spec.shape
    scale = TensorSpec(spec.name.removesuffix("weight") + SCALE, torch.float32, block_grid(rows, columns))
    return [TensorSpec(spec.name, E4M3, spec.shape), scale]


def _description(kept: list[str]) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [SCALE_GROUP, SCALE_GROUP],
        "modules_to_not_convert": kept,
    }


def _refuse_quantized(source: _Source) -> None:
    method = source.config.get("quantization_config", {}).get("quant_method")
    if method is not None:
        raise CheckpointError(
            f"{source.weights.folder / 'config.json'}: the checkpoint is quantized already (quant_method {method!r}); "
            "expected one in floating point (--dequantize writes one)"
        )
    for name, stored in source.weights.tensors.items():
        if stored.spec.dtype.itemsize == 1 and stored.spec.dtype.is_floating_point:
            raise CheckpointError(
                f"{stored.file}: tensor {name!r} is {stored.spec.dtype} already, though config.json has no "
                "quantization_config"
            )


def _check_blocks(source: _Source) -> None:
    told = source.config.get("quantization_config", {})
    found = told.get("quant_method"), told.get("weight_block_size")
    if found != ("fp8", [SCALE_GROUP, SCALE_GROUP]):
        raise CheckpointError(
            f"{source.weights.folder / 'config.json'}: got quant_method {found[0]!r} with weight_block_size "
            f"{found[1]}; expected 'fp8' with [{SCALE_GROUP}, {SCALE_GROUP}]"
        )


def _check_pairs(source: _Source, stored: list[TensorSpec], chosen: set[str], scales: set[str]) -> None:
    specs = {spec.name: spec for spec in stored}
    for name in sorted(chosen):
        scale, grid = specs.get(source.scale_of(name)), block_grid(*specs[name].shape)
        if scale is None:
            raise CheckpointError(
                f"{source.file_of(name)}: tensor {name!r} is in FP8, and {source.scale_of(name)!r} is missing: without "
                "its scales a weight is worth nothing"
            )
        if scale.shape != grid:
            raise CheckpointError(
                f"{source.file_of(scale.name)}: tensor {scale.name!r} has shape {list(scale.shape)}; expected "
                f"{list(grid)} for a weight {list(specs[name].shape)}"
            )
    for spec in stored:
        if spec.name.endswith(SCALE) and spec.name not in scales:
            raise CheckpointError(
                f"{source.file_of(spec.name)}: tensor {spec.name!r} scales nothing: no weight of its name is in FP8"
            )


def _read_scale(source: _Source, name: str) -> Tensor:
    scale = source.weights.read(name)
    if scale.dtype == torch.uint8 and source.config["quantization_config"].get("scale_fmt") == "ue8m0":
        scale = scale.view(torch.float8_e8m0fnu)  # bytes are exponents, not factors
    if not scale.is_floating_point():
        raise CheckpointError(
            f"{source.file_of(name)}: tensor {name!r} is {scale.dtype}; expected float32, or e8m0 exponents with "
            '"scale_fmt": "ue8m0" in quantization_config'
        )
    return scale.to(torch.float32)


def _write(
    source: _Source,
    out: str | Path,
    specs: list[TensorSpec],
    config: dict[str, Any],
    produce: Callable[[TensorSpec], Tensor],
    max_shard_bytes: int,
    options: dict[str, Any],
    advance: Callable[[int, int], None],
) -> None:
    total, done = _bytes(specs), 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        advance(done, total)

    parts = [mlacompile.__version__, source.weights.fingerprint(), config, options, max_shard_bytes]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    with CheckpointWriter(out, fingerprint=fingerprint) as writer:
        writer.write_tensors(plan_shards(specs, max_shard_bytes), produce, written)
        writer.write_json("config.json", config)
        for file in sorted(source.weights.folder.iterdir()):
            if file.is_file() and not any(file.match(pattern) for pattern in _NOT_COPIED):
                writer.copy(file)
        writer.commit()


def _bytes(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)
