"""``mlacompile.convert``: a model with grouped queries in, the same model with latent attention out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mlacompile
from mlacompile.checkpoint import CheckpointWriter, dtype_name, plan_shards
from mlacompile.checkpoint.writer import MAX_SHARD_BYTES
from mlacompile.convert import compression, own, report
from mlacompile.convert.check import Check, check
from mlacompile.convert.form import MLALayer
from mlacompile.convert.heal import Progress
from mlacompile.convert.latent import LayerReport
from mlacompile.convert.plan import Plan, lifted, plan
from mlacompile.convert.shelf import Shelf
from mlacompile.convert.source import Source, open_source
from mlacompile.errors import UnsupportedInputError, VerificationError

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Share of the cache to keep, if there is a text to fit to and nothing is said.
_BUDGET = 0.5
#: Files that make weights a model people can use, taken over as they are.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Conversion:
    """What was done: the folder, and the content of its conversion.json."""

    folder: Path
    report: dict[str, Any]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    target: str = "transformers",
    dtype: str = "auto",
    lossless: bool = False,
    kv_budget: float | None = None,
    kv_lora_rank: int | None = None,
    rope_dim: int | None = None,
    calibrate: str | Path | None = None,
    evaluate: Sequence[str | Path] = (),
    heal: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    check_result: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    head_dim: int | None = None,
    rope_theta: float | None = None,
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Conversion:
    """Write ``source`` with latent attention: without loss, or with a smaller cache, fitted to a text.

    A run that was interrupted goes on where it stopped when it is called again with the same arguments. The memory it
    takes is that of the largest tensors, not of the model; with a budget, that of a layer and its inputs.

    Args:
        source: a folder in Hugging Face's layout, or a ``.safetensors`` file.
        out: the folder to make; it appears when it is whole, and must not exist.
        config: a config.json for a ``source`` without one.
        target: "transformers", or "vllm" for a checkpoint that it takes too.
        dtype: "auto" (the source's), "float32", "bfloat16" or "float16".
        lossless: lose nothing, which is what happens anyway without a budget and a text.
        kv_budget: share of the source's cache to keep, over 0, at most 1. With a text and no budget, 0.5.
        kv_lora_rank: width of the latent, instead of a share.
        rope_dim: rotary lanes, even; by default by the budget.
        calibrate: the text to fit to and, its last tenth, to choose by: UTF-8, .jsonl or .parquet.
        evaluate: texts to report the loss on; nothing is fitted to or chosen by them.
        heal: minutes of distillation after that, the original being the teacher; over the whole calibration text.
        seed: of the sample that is fitted to.
        device: where layers are fitted.
        check_result: load the result, compare it with the source, and write down how far they are apart. Takes the
            memory of the model in float32.
        max_shard_bytes: largest shard.
        head_dim: the width of a head, for bare weights that do not tell.
        rope_theta: the rotary base, for bare weights that do not tell.
        say: told what is worth knowing, as it is found out.
        advance: told how much of how much is done ("writing": bytes; "compressing", "evaluating": layers).

    Raises:
        CheckpointError: the source is damaged, or ``out`` cannot be written.
        UnsupportedInputError: the model does not convert, or what is asked for is impossible; says why, and what is
            nearest.
        VerificationError: ``check_result`` found a difference that is more than rounding where nothing was to be lost;
            nothing is left at ``out``.
    """
    started = time.monotonic()
    if dtype not in DTYPES:
        raise UnsupportedInputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    opened = open_source(source, config=config, head_dim=head_dim, rope_theta=rope_theta)
    budget = _budget(opened, lossless, calibrate, kv_budget, kv_lora_rank, rope_dim, target)
    if budget is not None and calibrate is not None and kv_budget is None and kv_lora_rank is None:
        say(f"No budget is given: half of the cache is kept ({budget.rank} + {budget.rope_dim} values a token).")
    # Decided on shapes alone, so that what cannot be written is refused before the work.
    shapes = None
    if budget is not None:
        shapes = [budget.shape(opened.model, opened.dtype, bias=target != "vllm")] * opened.model.layers
    decided = plan(opened, target=target, dtype=DTYPES[dtype], layers=shapes)
    if heal < 0 or (heal and budget is None):
        raise UnsupportedInputError(
            f"--heal {heal:g}: expected minutes, and --calibrate TEXT: nothing is to heal where nothing is lost"
        )
    if evaluate:
        compression.refuse(opened.model, "evaluate")
    texts = [compression.Evaluation.read(opened, file) for file in evaluate]
    calibration = None if budget is None or calibrate is None else compression.Calibration.read(opened, calibrate)
    options: dict[str, Any] = {
        "target": target,
        "dtype": dtype_name(decided.dtype),
        "max_shard_bytes": max_shard_bytes,
        "seed": seed,
    }
    if budget is not None and calibration is not None and calibrate is not None:
        options |= {"kv_lora_rank": budget.rank, "rope_dim": budget.rope_dim}
        options |= {"heal": heal} if heal else {}
        options |= {"calibrate": {"name": Path(calibrate).name, "sha256_of_ids": calibration.digest}}
    losses: list[report.Loss] = []
    layers: Sequence[MLALayer] | None = None
    layer_reports: list[LayerReport] = []
    healing: Progress | None = None
    with CheckpointWriter(out, fingerprint=_fingerprint(decided, options)) as writer:
        if writer.finished:
            say(f"{len(writer.finished)} shards were finished by an earlier run, and are taken up.")
        if budget is not None and calibration is not None:
            shelf = Shelf(writer.scratch)
            if 0 in shelf:
                say("Layers that an earlier run has compressed are taken up.")
            layers, layer_reports = compression.compress(
                opened,
                budget,
                calibration,
                shelf,
                target=target,
                seed=seed,
                device=device,
                advance=lambda done, total: advance(done, total, "compressing"),
            )
            if heal:
                layers, healing = compression.heal(
                    opened,
                    layers,
                    calibration,
                    writer.scratch,
                    minutes=heal,
                    seed=seed,
                    device=device,
                    advance=lambda done, total: advance(done, total, "healing"),
                )
                say(f"Healed in {healing.step} steps: KL divergence {healing.first:.4f} -> {healing.best:.4f} nats.")
            decided = plan(opened, target=target, dtype=DTYPES[dtype], layers=layers)
            texts = [compression.Evaluation("validation part of the calibration text", calibration.validation), *texts]
        notes = report.notes(decided, compressed=layers is not None)
        for note in notes:
            say(note)
        for text in texts:
            measured = layers if layers is not None else lifted(opened)
            losses.append(
                report.Loss(
                    text.name,
                    *compression.evaluate(
                        opened,
                        [measured],
                        text.windows,
                        dtype=decided.dtype,
                        device=device,
                        advance=lambda done, total: advance(done, total, "evaluating"),
                    ),
                )
            )
        _write(decided, writer, max_shard_bytes, lambda done, total: advance(done, total, "writing"))
        found = None
        if check_result:
            say("Comparing the result with its source.")
            found = check(opened, writer.files, remote_code=bool(decided.needs_own_class))
            if layers is None:
                _refuse_difference(found)
        summary = report.summarize(decided, options, notes, found, layer_reports, losses)
        if healing is not None:
            summary["healing"] = {
                "minutes": heal,
                "steps": healing.step,
                "kl": {"before": healing.first, "best": healing.best},
            }
        summary["seconds"] = round(time.monotonic() - started, 1)
        writer.write_json("conversion.json", summary)
        writer.write_bytes("conversion.html", report.to_html(summary).encode())
        writer.commit()
    return Conversion(Path(out), summary)


def _budget(
    source: Source,
    lossless: bool,
    calibrate: str | Path | None,
    kv_budget: float | None,
    kv_lora_rank: int | None,
    rope_dim: int | None,
    target: str,
) -> compression.Budget | None:
    """What the options that can contradict each other amount to; None is lossless."""
    asked = {"kv_budget": kv_budget, "kv_lora_rank": kv_lora_rank, "rope_dim": rope_dim}
    given = ["--" + name.replace("_", "-") for name, value in asked.items() if value is not None]
    if lossless:
        given += ["--calibrate"] if calibrate is not None else []
        if given:
            raise UnsupportedInputError(f"--lossless keeps everything, {given[0]} does not; give one of them")
        return None
    if calibrate is not None and kv_budget is None and kv_lora_rank is None:
        asked["kv_budget"] = _BUDGET
    budget = compression.Budget.parse(source.model, target=target, **asked)  # type: ignore[arg-type]
    if budget is None:
        return None
    compression.refuse(source.model)
    if calibrate is None:
        raise UnsupportedInputError(
            f"{given[0]} needs --calibrate TEXT beside it: what can be left out shows on a text, the weights do not say"
        )
    return budget


def check_conversion(
    source: str | Path, folder: str | Path, *, config: str | Path | None = None, **bare: Any
) -> tuple[Check, bool]:
    """Compare a finished conversion with its source. Returns the figures, and whether they have to be rounding only.

    Raises:
        UnsupportedInputError: ``folder`` is no finished conversion.
    """
    file = Path(folder) / "conversion.json"
    try:
        summary = json.loads(file.read_text())
        remote_code, lossless = summary["result"]["trust_remote_code"], summary["method"] == "lossless"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedInputError(f"{folder}: not a finished conversion ({file.name}: {error})") from error
    return check(open_source(source, config=config, **bare), Path(folder), remote_code=remote_code), lossless


def _write(decided: Plan, writer: CheckpointWriter, max_shard_bytes: int, advance: Callable[[int, int], None]) -> None:
    specs = decided.specs()
    total, done = sum(spec.nbytes for spec in specs), 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        advance(done, total)

    writer.write_tensors(plan_shards(specs, max_shard_bytes), decided.produce, written)
    writer.write_json("config.json", decided.config())
    if decided.needs_own_class:
        writer.write_bytes(*own.modeling_file(decided.model))
    for file in companions(decided.source):
        writer.copy(file)


def companions(source: Source) -> list[Path]:
    """Tokenizer, generation settings and licence beside the weights."""
    found = {file for pattern in _COMPANIONS for file in source.weights.folder.glob(pattern) if file.is_file()}
    return sorted(found)


def _fingerprint(decided: Plan, options: dict[str, Any]) -> str:
    """Everything that decides the bytes of the result."""
    source = decided.source
    parts = [mlacompile.__version__, source.weights.fingerprint(), source.model.config.to_dict(), options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _refuse_difference(found: Check) -> None:
    if not found.lossless:
        raise VerificationError(
            f"the result differs from its source: logits by up to {found.max_error:.2e} (largest logit "
            f"{found.max_logit:.2e}), which is more than rounding: nothing is left at the place of the result"
        )
