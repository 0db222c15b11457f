"""Texts: read in every form, and refused with the place where they are none."""

import json
import sys
from pathlib import Path

import pytest

from mlacompile.convert.texts import read_text, tokenize
from mlacompile.errors import UnsupportedInputError


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_plain_and_json_lines(tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "a.txt", "Grüße".encode())) == "Grüße"
    lines = "\n".join([json.dumps({"text": "one", "id": 1}), "", json.dumps("zwei ü")])
    assert read_text(write(tmp_path / "a.jsonl", lines.encode())) == "one\n\nzwei ü"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t", "empty"),
        ("a.jsonl", b"\n", "empty"),
        ("a.txt", b"good \xff bad", "not text: byte 0xff at 5 is not UTF-8"),
        ("a.bin", b"PK\3\4\0\0", "not text: a zero byte at 4"),
        ("a.jsonl", b'"a"\n{', "line 2 is not JSON"),
        ("a.jsonl", b'{"content": "a"}', 'line 1: expected a string, or an object with a "text"'),
        ("a.jsonl", b"3", "line 1: expected a string"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        read_text(write(tmp_path / name, data))


def test_places(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(UnsupportedInputError, match="no such file"):
            read_text(path)


def test_too_short(tmp_path: Path) -> None:
    def tokenizer(text: str, **options: bool) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": list(range(len(text)))}

    file = write(tmp_path / "a.txt", b"abc")
    assert tokenize(tokenizer, file, at_least=3).tolist() == [0, 1, 2]
    with pytest.raises(UnsupportedInputError, match="too short: 3 tokens, expected at least 4"):
        tokenize(tokenizer, file, at_least=4)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow, which nothing else here does")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), file)
    assert read_text(file) == "one\n\ntwo"
    parquet.write_table(pyarrow.table({"text": [1, 2]}), file)
    with pytest.raises(UnsupportedInputError, match="row 0 of 'text' is int, not text"):
        read_text(file)
    parquet.write_table(pyarrow.table({"body": ["a"]}), file)
    with pytest.raises(UnsupportedInputError, match=r"columns \['body'\]; expected one called"):
        read_text(file)
    with pytest.raises(UnsupportedInputError, match="not a parquet file"):
        read_text(write(file, b"PAR1 but not really"))


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedInputError, match="pip install pyarrow"):
        read_text(write(tmp_path / "a.parquet", b""))
