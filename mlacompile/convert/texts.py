"""Texts to calibrate and to evaluate on: plain text, JSON lines, parquet; what is no text is said to be none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError

_COLUMN = "text"


def read_text(path: str | Path) -> str:
    """The text in a file: ``.jsonl`` (strings, or objects with a "text"), ``.parquet`` (a column "text"), else UTF-8.

    Documents are joined by a blank line.

    Raises:
        UnsupportedInputError: there is no such file, it is empty, or it is not text; says where.
    """
    path = Path(path)
    if not path.is_file():
        raise UnsupportedInputError(f"{path}: no such file; expected a text (UTF-8, .jsonl or .parquet)")
    if path.suffix == ".parquet":
        text = "\n\n".join(_parquet(path))
    elif path.suffix in (".jsonl", ".ndjson"):
        text = "\n\n".join(_json_lines(path))
    else:
        text = _plain(path)
    if not text.strip():
        raise UnsupportedInputError(f"{path}: empty; expected a text")
    return text


def tokenize(tokenizer: Any, path: str | Path, *, at_least: int) -> Tensor:
    """Token ids [N] of a text, the whole file at once and without special tokens.

    Raises:
        UnsupportedInputError: fewer than ``at_least`` tokens; or see ``read_text``.
    """
    ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < at_least:
        raise UnsupportedInputError(f"{path}: too short: {len(ids)} tokens, expected at least {at_least}")
    return torch.tensor(ids)


def _plain(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnsupportedInputError(
            f"{path}: not text: byte {data[error.start]:#04x} at {error.start} is not UTF-8; expected UTF-8, .jsonl or "
            ".parquet"
        ) from error
    if "\0" in text:
        raise UnsupportedInputError(f"{path}: not text: a zero byte at {text.index(chr(0))}")
    return text


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_plain(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UnsupportedInputError(f"{path}: line {number} is not JSON: {error}") from error
        text = value.get(_COLUMN) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UnsupportedInputError(f'{path}: line {number}: expected a string, or an object with a "{_COLUMN}"')
        yield text


def _parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UnsupportedInputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UnsupportedInputError(f"{path}: not a parquet file: {error}") from error
    if _COLUMN not in table.column_names:
        raise UnsupportedInputError(f'{path}: columns {table.column_names}; expected one called "{_COLUMN}"')
    values = table.column(_COLUMN).to_pylist()
    wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if wrong is not None:
        raise UnsupportedInputError(f"{path}: row {wrong} of {_COLUMN!r} is {type(values[wrong]).__name__}, not text")
    return values
