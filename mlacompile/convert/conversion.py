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
from mlacompile.convert.distill import Progress
from mlacompile.convert.effort import DEFAULT, EFFORTS
from mlacompile.convert.form import MLALayer
from mlacompile.convert.latent import LayerReport
from mlacompile.convert.plan import Plan, lifted, plan
from mlacompile.convert.shelf import Shelf
from mlacompile.convert.source import Source, open_source
from mlacompile.errors import UnsupportedInputError, VerificationError

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Share of the cache to keep, if there is a text to fit to and nothing is said.
_BUDGET = 0.5
_VALIDATION = "validation part of the calibration text"
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
    effort: str = DEFAULT,
    evaluate: Sequence[str | Path] = (),
    heal: float = 0.0,
    heal_steps: int = 0,
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
        effort: "fast" or "full": how much of the text is read, and how much is tried.
        evaluate: texts to report the loss on; nothing is fitted to or chosen by them.
        heal: minutes of distillation after that, the original being the teacher; over the whole calibration text.
        heal_steps: so many steps of it instead, which give the same result however long they take.
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
    started, worked = time.monotonic(), time.process_time()
    if dtype not in DTYPES:
        raise UnsupportedInputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if effort not in EFFORTS:
        raise UnsupportedInputError(f"effort {effort!r}: expected one of {', '.join(EFFORTS)}")
    opened = open_source(source, config=config, head_dim=head_dim, rope_theta=rope_theta)
    fit = _asked_fit(
        opened,
        lossless=lossless,
        calibrate=calibrate,
        effort=effort,
        heal=_Healing(heal, heal_steps),
        target=target,
        widths={"kv_budget": kv_budget, "kv_lora_rank": kv_lora_rank, "rope_dim": rope_dim},
        say=say,
    )
    # Decided on shapes alone, so that what cannot be written is refused before the work.
    shapes = None if fit is None else fit.shapes(opened, target)
    decided = plan(opened, target=target, dtype=DTYPES[dtype], layers=shapes)
    if evaluate:
        compression.refuse(opened.model, "evaluate")
    texts = [compression.Evaluation.read(opened, file) for file in evaluate]
    options = {"target": target, "dtype": dtype_name(decided.dtype), "max_shard_bytes": max_shard_bytes}
    if fit is not None:
        options |= {"seed": seed} | fit.options()
    with CheckpointWriter(out, fingerprint=_fingerprint(decided, options)) as writer:
        if writer.finished:
            say(f"{len(writer.finished)} shards were finished by an earlier run, and are taken up.")
        made = None
        if fit is not None:
            made = _make(
                opened,
                fit,
                writer.scratch,
                target=target,
                dtype=decided.dtype,
                seed=seed,
                device=device,
                say=say,
                advance=advance,
            )
            decided = plan(opened, target=target, dtype=DTYPES[dtype], layers=made.layers)
        notes = report.notes(decided, compressed=fit is not None)
        for note in notes:
            say(note)
        layers = lifted(opened) if made is None else made.layers
        losses = [] if made is None else [made.loss]
        losses += [_measure(opened, layers, text, decided.dtype, device, advance) for text in texts]
        _write(decided, writer, max_shard_bytes, lambda done, total: advance(done, total, "writing"))
        found = None
        if check_result:
            say("Comparing the result with its source.")
            found = check(opened, writer.files, remote_code=bool(decided.needs_own_class))
            if made is None:
                _refuse_difference(found)
        summary = report.summarize(decided, options, notes, found, made.reports if made else [], losses)
        if made is not None and made.healing is not None:
            summary["healing"] = made.healing.to_json()
        summary["seconds"] = round(time.monotonic() - started, 1)
        summary["threads"] = torch.get_num_threads()
        summary["cpu_seconds"] = round(time.process_time() - worked, 1)
        writer.write_json("conversion.json", summary)
        writer.write_bytes("conversion.html", report.to_html(summary).encode())
        writer.commit()
    return Conversion(Path(out), summary)


@dataclass(frozen=True)
class _Healing:
    """How long it takes, one way or the other; neither is not at all."""

    minutes: float = 0.0
    steps: int = 0

    def __bool__(self) -> bool:
        return bool(self.minutes or self.steps)

    def refuse(self, *, lossless: bool) -> None:
        """Raises ``UnsupportedInputError`` for what makes no sense."""
        if self.minutes and self.steps:
            raise UnsupportedInputError("--heal and --heal-steps both say how long to heal; give one of them")
        if min(self.minutes, self.steps) < 0 or (self and lossless):
            asked = f"--heal-steps {self.steps}" if self.steps else f"--heal {self.minutes:g}"
            raise UnsupportedInputError(
                f"{asked}: expected minutes, and --calibrate TEXT: nothing is to heal where nothing is lost"
            )

    def options(self) -> dict[str, Any]:
        return {"heal": self.minutes} if self.minutes else {"heal_steps": self.steps} if self.steps else {}


@dataclass(frozen=True)
class _Fit:
    """That something is to be lost: how much is kept, and the text that says what."""

    budget: compression.Budget
    calibration: compression.Calibration
    text: str
    effort: str
    heal: _Healing

    def shapes(self, source: Source, target: str) -> Sequence[MLALayer]:
        return [self.budget.shape(source.model, source.dtype, bias=target != "vllm")] * source.model.layers

    def options(self) -> dict[str, Any]:
        text = {"name": self.text, "sha256_of_ids": self.calibration.digest}
        widths = {"kv_lora_rank": self.budget.rank, "rope_dim": self.budget.rope_dim}
        return widths | {"calibrate": text, "effort": self.effort} | self.heal.options()


@dataclass(frozen=True)
class _Made:
    """Compressed layers, what each of them misses, what all of them lose on validation text, and how healing went."""

    layers: Sequence[MLALayer]
    reports: list[LayerReport]
    loss: report.Loss
    healing: Progress | None = None


def _asked_fit(
    source: Source,
    *,
    lossless: bool,
    calibrate: str | Path | None,
    effort: str,
    heal: _Healing,
    target: str,
    widths: dict[str, Any],
    say: Callable[[str], None],
) -> _Fit | None:
    """What the options that can contradict each other amount to; None is lossless."""
    given = ["--" + name.replace("_", "-") for name, value in widths.items() if value is not None]
    if lossless and (given or calibrate is not None):
        raise UnsupportedInputError(
            f"--lossless keeps everything, {(given or ['--calibrate'])[0]} does not; give one of them"
        )
    unsized = widths["kv_budget"] is None and widths["kv_lora_rank"] is None
    if calibrate is not None and unsized:
        widths = widths | {"kv_budget": _BUDGET}
    budget = compression.Budget.parse(source.model, target=target, **widths)
    heal.refuse(lossless=budget is None)
    if budget is None:
        return None
    compression.refuse(source.model)
    if calibrate is None:
        raise UnsupportedInputError(
            f"{given[0]} needs --calibrate TEXT beside it: what can be left out shows on a text, the weights do not say"
        )
    if unsized:
        say(f"No budget is given: half of the cache is kept ({budget.rank} + {budget.rope_dim} values a token).")
    calibration = compression.Calibration.read(source, calibrate, EFFORTS[effort])
    return _Fit(budget, calibration, Path(calibrate).name, effort, heal)


def _make(
    source: Source,
    fit: _Fit,
    scratch: Path,
    *,
    target: str,
    dtype: torch.dtype,
    seed: int,
    device: str | torch.device,
    say: Callable[[str], None],
    advance: Callable[[int, int, str], None],
) -> _Made:
    shelf = Shelf(scratch)
    if 0 in shelf:
        say("Layers that an earlier run has compressed are taken up.")
    fitted = compression.compress(
        source,
        fit.budget,
        fit.calibration,
        shelf,
        target=target,
        seed=seed,
        device=device,
        dtype=dtype,
        effort=EFFORTS[fit.effort],
        advance=lambda done, total: advance(done, total, "compressing"),
    )
    if not fit.heal:
        return _Made(fitted.layers, fitted.reports, report.Loss(_VALIDATION, fitted.before, fitted.after))
    layers, healing = compression.heal(
        source,
        fitted.layers,
        fit.calibration,
        scratch,
        minutes=fit.heal.minutes or None,
        steps=fit.heal.steps or None,
        seed=seed,
        device=device,
        advance=lambda done, total: advance(done, total, "healing"),
    )
    say(f"Healed in {healing.step} steps: KL divergence {healing.first:.4f} -> {healing.best:.4f} nats.")
    validation = compression.Evaluation(_VALIDATION, fit.calibration.validation)
    return _Made(layers, fitted.reports, _measure(source, layers, validation, dtype, device, advance), healing)


def _measure(
    source: Source,
    layers: Sequence[MLALayer],
    text: compression.Evaluation,
    dtype: torch.dtype,
    device: str | torch.device,
    advance: Callable[[int, int, str], None],
) -> report.Loss:
    before, after = compression.evaluate(
        source,
        [layers],
        text.windows,
        dtype=dtype,
        device=device,
        advance=lambda done, total: advance(done, total, "evaluating"),
    )
    return report.Loss(text.name, before, after)


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
