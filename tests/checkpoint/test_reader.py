"""Reading: the library's files are read as the library reads them, and damage is said with file and tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlacompile.checkpoint import CheckpointReader
from mlacompile.checkpoint.tensors import DTYPES
from mlacompile.errors import CheckpointError


def sharded(folder: Path) -> Path:
    """Two shards and an index: a, b in the first, c in the second."""
    shards = {"one.safetensors": {"a": torch.ones(3), "b": torch.zeros(2, 2)}, "two.safetensors": {"c": torch.ones(5)}}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    homes = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


def test_every_dtype_of_the_library_is_read_bit_by_bit(tmp_path: Path) -> None:
    tensors = {}
    for name, dtype in DTYPES.items():
        bits = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 4, dtype.itemsize), dtype=torch.uint8)
        tensors[name] = bits.view(dtype).reshape(3, 4)
    tensors |= {"empty": torch.empty(0, 7), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    reader = CheckpointReader(tmp_path / "x.safetensors")
    assert set(reader.tensors) == set(tensors)
    for name, tensor in tensors.items():
        got = reader.read(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert got.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    reader = CheckpointReader(sharded(tmp_path))
    assert reader.read("c").equal(torch.ones(5))
    assert reader.spec("b").shape == (2, 2)
    assert "d" not in reader
    with pytest.raises(CheckpointError, match="'d' is missing"):
        reader.read("d")


def test_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors: missing.*'c'"):
        CheckpointReader(tmp_path)


def test_tensor_that_the_index_promises_and_no_shard_has(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, sharded(tmp_path) / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors: tensor 'b' is not in it"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "weight_map"), ("{}", "weight_map")])
def test_damaged_index(tmp_path: Path, text: str, message: str) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


def test_index_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../one.safetensors"}}')
    with pytest.raises(CheckpointError, match="without a folder"):
        CheckpointReader(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "one.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"one\.safetensors"):
            CheckpointReader(tmp_path)
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated: tensor 'b'"):
        CheckpointReader(tmp_path)


def test_trailing_bytes_and_damaged_headers_are_noticed(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "one.safetensors"
    whole = file.read_bytes()
    damages = {
        whole + b"\0": "1 bytes follow",
        whole.replace(b'"F32"', b'"F99"'): "dtype 'F99'",
        whole.replace(b"[2,2]", b"[2,3]"): "damaged header",
        whole.replace(b'{"', b"{{", 1): "damaged safetensors header",
        b"\xff" * 8 + whole[8:]: "header alone",
        b"": "not a whole",
    }
    for damaged, message in damages.items():
        assert damaged != whole
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_nan_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    weight = torch.zeros(3, 5)
    weight[1, 4] = torch.nan
    save_file({"good": torch.zeros(3), "bad": weight.to(DTYPES[name])}, tmp_path / "x.safetensors")
    reader = CheckpointReader(tmp_path)
    reader.read("good")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'bad' is nan at \[1, 4\]"):
        reader.read("bad")


def test_infinity_is_refused(tmp_path: Path) -> None:
    save_file({"bad": torch.tensor([1.0, -torch.inf])}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"'bad' is -inf at \[1\]"):
        CheckpointReader(tmp_path).read("bad")


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    reader = CheckpointReader(sharded(tmp_path))
    file = tmp_path / "two.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"two\.safetensors: truncated inside tensor 'c': got 16 of 20"):
        reader.read("c")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for path in (tmp_path, file):
        with pytest.raises(CheckpointError, match="pickle"):
            CheckpointReader(path)


def test_folder_without_weights_and_path_without_anything(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        CheckpointReader(tmp_path / "x")
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match="GGUF"):
        CheckpointReader(tmp_path)


def test_tensor_in_two_files(tmp_path: Path) -> None:
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"'x' is both in .*a\.safetensors and in .*b\.safetensors"):
        CheckpointReader(tmp_path)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    first = CheckpointReader(sharded(tmp_path)).fingerprint()
    assert CheckpointReader(tmp_path).fingerprint() == first
    save_file({"c": torch.ones(6)}, tmp_path / "two.safetensors")
    assert CheckpointReader(tmp_path).fingerprint() != first
