"""Writing: what the library reads back, whole or not at all, the same bytes after any interruption."""

import errno
import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mlacompile.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec, plan_shards, writer
from mlacompile.checkpoint.tensors import DTYPES
from mlacompile.errors import CheckpointError

SPECS = [TensorSpec(f"t{i}", torch.float32, (i + 1, 3)) for i in range(6)]


def produce(spec: TensorSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, spec.name)))
    return torch.randint(0, 100, spec.shape, generator=generator).to(spec.dtype)


def write(out: Path, *, pause: float = 0) -> None:
    def slowly(spec: TensorSpec) -> torch.Tensor:
        time.sleep(pause)
        return produce(spec)

    with CheckpointWriter(out, fingerprint="f") as target:
        target.write_tensors(plan_shards(SPECS, 60), slowly)
        target.write_json("config.json", {"a": "ü"})
        target.commit()


def in_a_child(work: Callable[[], object]) -> int:
    """Begin ``work`` in a fork of this process; its exit code is 0 if it came to its end. Returns its id.

    A fork of a large process is slow to start, so this waits until the work has begun.
    """
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(begins, b".")
            # A fork has none of its parent's worker threads, and waits for them forever if it may use them.
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    os.read(begun, 1)
    os.close(begun)
    os.close(begins)
    return child


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), min_size=1))
def test_the_library_reads_what_is_written(tmp_path_factory: pytest.TempPathFactory, kinds: list) -> None:
    specs = [TensorSpec(f"t{i}", DTYPES[name], tuple(shape)) for i, (name, shape) in enumerate(kinds)]
    out = tmp_path_factory.mktemp("w") / "out"
    with CheckpointWriter(out, fingerprint="") as target:
        target.write_tensors(plan_shards(specs), produce)
        target.commit()
    loaded = load_file(out / "model.safetensors")
    reader = CheckpointReader(out)
    assert set(loaded) == {spec.name for spec in specs}
    for spec in specs:
        for got in (loaded[spec.name], reader.read(spec.name)):
            assert (got.dtype, tuple(got.shape)) == (spec.dtype, spec.shape)
            assert got.to(torch.float64).equal(produce(spec).to(torch.float64))
        assert reader.tensors[spec.name].offset % spec.dtype.itemsize == 0


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 100))
def test_shards_keep_order_and_size(sizes: list[int], limit: int) -> None:
    specs = [TensorSpec(f"t{i}", torch.uint8, (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(specs, limit)
    assert [spec for group in shards.values() for spec in group] == specs
    assert list(shards) == sorted(shards)
    assert all(group for group in shards.values())
    assert all(sum(spec.nbytes for spec in group) <= limit or len(group) <= 2 for group in shards.values())


def test_index_and_metadata(tmp_path: Path) -> None:
    write(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118, not a dict
            assert opened.metadata() == {"format": "pt"}
    assert not (tmp_path / "out.partial").exists()


def test_nothing_appears_before_commit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, fingerprint="") as target:
        target.write_tensors(plan_shards(SPECS), produce)
    assert not out.exists()


def test_existing_folders_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"), CheckpointWriter(out, fingerprint=""):
        pass
    assert list(tmp_path.iterdir()) == [out]
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists already"), CheckpointWriter(out, fingerprint=""):
        pass
    with pytest.raises(CheckpointError, match="no folder"), CheckpointWriter(tmp_path / "a" / "b", fingerprint=""):
        pass


def test_what_is_left_beside_a_whole_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run that was killed when the folder had its name. What another run is still making stays."""
    out, work = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as killed:
        killed.setattr(writer.shutil, "rmtree", lambda *args, **settings: None)
        write(out)
    assert work.exists()
    with pytest.raises(CheckpointError, match="exists already"):
        write(out)
    assert not work.exists()
    (work / "files").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="exists already"):
        write(out)
    assert (work / "files").exists()


def test_folder_made_by_somebody_else_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, fingerprint="") as target:
        target.write_tensors(plan_shards(SPECS), produce)
        out.mkdir()
        with pytest.raises(CheckpointError, match="exists already"):
            target.commit()


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "out", fingerprint=""),
        pytest.raises(CheckpointError, match="another process"),
        CheckpointWriter(tmp_path / "out", fingerprint=""),
    ):
        pass
    write(tmp_path / "out")


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", fingerprint="") as target:
        for wrong in (torch.zeros(1, 4), torch.zeros(1, 3, dtype=torch.float64)):
            with pytest.raises(CheckpointError, match=r"'t0': got .*, expected torch\.float32 \[1, 3\]"):
                target.write_tensors(plan_shards(SPECS), lambda spec, wrong=wrong: wrong)


def test_a_run_takes_up_what_an_earlier_one_finished(tmp_path: Path) -> None:
    made: list[str] = []

    def interrupted(spec: TensorSpec) -> torch.Tensor:
        if spec.name == "t4" and "t4" not in made:
            made.append("t4")
            raise KeyboardInterrupt
        made.append(spec.name)
        return produce(spec)

    shards = plan_shards(SPECS, 60)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", fingerprint="f") as target:
        target.write_tensors(shards, interrupted)
    with CheckpointWriter(tmp_path / "out", fingerprint="f") as target:
        assert target.finished == list(shards)[:-2]
        target.write_tensors(shards, interrupted)
        target.write_json("config.json", {"a": "ü"})
        target.commit()
    assert sorted(made) == ["t0", "t1", "t2", "t3", "t4", "t4", "t5"]
    write(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["fingerprint", "shard", "record", "missing"])
def test_what_does_not_fit_is_made_again(tmp_path: Path, damage: str) -> None:
    shards = plan_shards(SPECS, 60)
    with CheckpointWriter(tmp_path / "out", fingerprint="old" if damage == "fingerprint" else "f") as target:
        target.write_tensors(shards, produce)
        (target.scratch / "state").write_text("old")
    partial = tmp_path / "out.partial"
    first = partial / "files" / next(iter(shards))
    (partial / "files" / "stray.safetensors").write_bytes(b"half")
    if damage == "shard":
        data = bytearray(first.read_bytes())
        data[-1] ^= 1
        first.write_bytes(data)
    elif damage == "record":
        (partial / "progress.json").write_text('{"fingerprint": "f", "shards"')
    elif damage == "missing":
        first.unlink()
    with CheckpointWriter(tmp_path / "out", fingerprint="f") as target:
        whole = damage in ("fingerprint", "record")
        assert target.finished == ([] if whole else list(shards)[1:])
        assert (target.scratch / "state").exists() == (not whole)
    write(tmp_path / "out")
    write(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_without_room_is_noticed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with CheckpointWriter(tmp_path / "out", fingerprint="") as target:
        match = r"0\.00 GB to write, but the disk has 0\.00 GB left"
        with pytest.raises(CheckpointError, match=match):
            target.write_tensors(plan_shards(SPECS), lambda spec: pytest.fail("worked"))


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes, real = 0, writer._write

    def full(stream: io.FileIO, data: memoryview) -> None:
        nonlocal writes
        writes += 1
        if writes == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(stream, data)

    monkeypatch.setattr(writer, "_write", full)
    with pytest.raises(CheckpointError, match=r"\.safetensors\.tmp: tensor 't2': the disk is full"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writer, "_write", real)
    write(tmp_path / "out")
    assert CheckpointReader(tmp_path / "out").read("t5").equal(produce(SPECS[5]))


def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    moments, reach, killed, taken_up, out = random.Random(0), 0.1, 0, 0, tmp_path / "out"
    while killed < 10 or not out.exists():
        if out.exists():
            out = tmp_path / f"{out.name}+"  # one that came to its end before its moment counts for nothing
        taken_up += bool(list(tmp_path.glob(f"{out.name}.partial/**/*.safetensors")))
        child = in_a_child(lambda out=out: write(out, pause=0.01))
        if killed < 10:
            time.sleep(moments.uniform(0, reach))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        killed += os.WIFSIGNALED(status)
        reach *= 1.3 if os.WIFSIGNALED(status) else 0.6  # moments that fall into the work, however slow the machine is
        assert not out.exists() or contents(out) == contents(tmp_path / "whole")
    assert taken_up
