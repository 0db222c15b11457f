"""``mlacompile.convert``: a model with grouped queries in, the same model with latent attention out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mlacompile
from mlacompile.checkpoint import CheckpointWriter, dtype_name, plan_shards
from mlacompile.checkpoint.writer import MAX_SHARD_BYTES
from mlacompile.convert import own, report
from mlacompile.convert.check import Check, check
from mlacompile.convert.plan import Plan, plan
from mlacompile.convert.source import Source, open_source
from mlacompile.errors import UnsupportedInputError, VerificationError

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    check_result: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    head_dim: int | None = None,
    rope_theta: float | None = None,
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion:
    """Write ``source`` with latent attention, without loss.

    A run that was interrupted goes on where it stopped when it is called again with the same arguments. The memory it
    takes is that of the largest tensors, not of the model.

    Args:
        source: a folder in Hugging Face's layout, or a ``.safetensors`` file.
        out: the folder to make; it appears when it is whole, and must not exist.
        config: a config.json for a ``source`` without one.
        target: "transformers", or "vllm" for a checkpoint that it takes too.
        dtype: "auto" (the source's), "float32", "bfloat16" or "float16".
        check_result: load the result, compare it with the source, and write down how far they are apart. Takes the
            memory of the model in float32.
        max_shard_bytes: largest shard.
        head_dim: the width of a head, for bare weights that do not tell.
        rope_theta: the rotary base, for bare weights that do not tell.
        say: told what is worth knowing, as it is found out.
        advance: told how many bytes of how many are written.

    Raises:
        CheckpointError: the source is damaged, or ``out`` cannot be written.
        UnsupportedInputError: the model does not convert; says why, and what is nearest.
        VerificationError: ``check_result`` found a difference that is more than rounding; nothing is left at ``out``.
    """
    started = time.monotonic()
    if dtype not in DTYPES:
        raise UnsupportedInputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    opened = open_source(source, config=config, head_dim=head_dim, rope_theta=rope_theta)
    decided = plan(opened, target=target, dtype=DTYPES[dtype])
    notes = report.notes(decided)
    for note in notes:
        say(note)
    options = {"target": target, "dtype": dtype_name(decided.dtype), "max_shard_bytes": max_shard_bytes}
    with CheckpointWriter(out, fingerprint=_fingerprint(decided, options)) as writer:
        if writer.finished:
            say(f"{len(writer.finished)} shards were finished by an earlier run, and are taken up.")
        _write(decided, writer, max_shard_bytes, advance)
        found = None
        if check_result:
            say("Comparing the result with its source.")
            found = check(opened, writer.files, remote_code=bool(decided.needs_own_class))
            _refuse_difference(found)
        summary = report.summarize(decided, options, notes, found)
        summary["seconds"] = round(time.monotonic() - started, 1)
        writer.write_json("conversion.json", summary)
        writer.write_bytes("conversion.html", report.to_html(summary).encode())
        writer.commit()
    return Conversion(Path(out), summary)


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
