"""The whole way: a folder appears when it is whole, whatever happens meanwhile; its report tells the truth."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mlacompile
from mlacompile.checkpoint import CheckpointReader, TensorSpec
from mlacompile.convert import check_conversion, convert
from mlacompile.convert.plan import Plan
from mlacompile.errors import UnsupportedInputError
from tests.checkpoint.test_writer import in_a_child
from tests.convert.conftest import contents

Save = Callable[..., Path]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor takes five milliseconds, so that a run can be killed in the middle."""
    quick = Plan.produce

    def slowly(self: Plan, spec: TensorSpec) -> torch.Tensor:
        time.sleep(0.005)
        return quick(self, spec)

    monkeypatch.setattr(Plan, "produce", slowly)


@pytest.mark.usefixtures("slow")
def test_killed_at_ten_random_moments(save: Save, tmp_path: Path) -> None:
    source = save("qwen3", head_dim=16)
    convert(source, tmp_path / "whole", max_shard_bytes=20_000)
    shards = len(list((tmp_path / "whole").glob("*.safetensors")))
    assert shards > 4
    moments, reach, killed, taken_up, out = random.Random(1), 0.3, 0, 0, tmp_path / "out"
    while killed < 10 or not out.exists():
        if out.exists():
            out = tmp_path / f"{out.name}+"  # one that came to its end before its moment counts for nothing
        taken_up += bool(list(tmp_path.glob(f"{out.name}.partial/files/*.safetensors")))
        child = in_a_child(lambda out=out: convert(source, out, max_shard_bytes=20_000))
        if killed < 10:
            time.sleep(moments.uniform(0, reach))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        killed += os.WIFSIGNALED(status)
        reach *= 1.3 if os.WIFSIGNALED(status) else 0.6  # moments that fall into the work, however slow the machine is
        assert not out.exists() or contents(out) == contents(tmp_path / "whole")
    assert taken_up
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupt_is_gone_on_from(save: Save, tmp_path: Path) -> None:
    source = save()

    def stop(done: int, total: int, what: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", max_shard_bytes=20_000, advance=stop)
    assert not (tmp_path / "out").exists()
    heard: list[str] = []
    convert(source, tmp_path / "out", max_shard_bytes=20_000, say=heard.append)
    assert any("finished by an earlier run" in text for text in heard)
    convert(source, tmp_path / "whole", max_shard_bytes=20_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_source_or_option_starts_anew(save: Save, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    for change in ({"dtype": "bfloat16"}, {"max_shard_bytes": 15_000}):
        with pytest.raises(KeyboardInterrupt):
            convert(save(), tmp_path / "out", max_shard_bytes=20_000, advance=stop)
        heard: list[str] = []
        options = {"max_shard_bytes": 20_000, **change}
        convert(save(), tmp_path / "out", say=heard.append, **options)  # type: ignore[arg-type]
        assert not any("earlier run" in text for text in heard)
        convert(save(), tmp_path / "whole", **options)  # type: ignore[arg-type]
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        (tmp_path / "out").rename(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        (tmp_path / "whole").rename(tmp_path / f"whole{len(list(tmp_path.iterdir()))}")


def test_progress_counts_every_byte(save: Save, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(save(), tmp_path / "out", advance=lambda done, total, what: seen.append((done, total)))
    reader = CheckpointReader(tmp_path / "out")
    total = sum(stored.spec.nbytes for stored in reader.tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_report_counts_right(save: Save, tmp_path: Path) -> None:
    source = save(dtype=torch.bfloat16, head_dim=32)
    report = mlacompile.convert(source, tmp_path / "out").report
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == report
    for side, folder in (("source", source), ("result", tmp_path / "out")):
        sizes = [torch.Size(stored.spec.shape).numel() for stored in CheckpointReader(folder).tensors.values()]
        assert report[side]["parameters"] == sum(sizes)
    assert report["cache"]["bytes_per_token"] == {"source": 2 * 2 * 32 * 2 * 2, "result": 2 * 2 * 32 * 2 * 2}
    assert report["cache"]["kept"] == 1.0
    assert [(row["rank"], row["rope"]) for row in report["layers"]] == [(64, 64)] * 2
    page = (tmp_path / "out" / "conversion.html").read_text()
    assert "<svg" in page
    assert "Not compared" in page
    assert not re.search(r'(src|href)="(?!#)', page)  # the page stands alone


def test_names_in_the_report_are_text(save: Save, tmp_path: Path) -> None:
    source = save(to="<b>&")
    convert(source, tmp_path / "out", check_result=True)
    page = (tmp_path / "out" / "conversion.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "Only rounding" in page


def test_what_belongs_to_a_model_comes_along(save: Save, tmp_path: Path) -> None:
    source = save()
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "LICENSE", "chat_template.jinja"):
        (source / name).write_text(name)
    for name in ("README.md", "training_args.bin", "modeling_llama.py", "pytorch_model.bin"):
        (source / name).write_text(name)
    convert(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("tokenizer.json", "tokenizer_config.json", "merges.txt", "LICENSE", "chat_template.jinja"),
        *("config.json", "generation_config.json", "model.safetensors", "conversion.json", "conversion.html"),
    }


def test_a_finished_conversion_can_be_checked_later(save: Save, tmp_path: Path) -> None:
    source = save("qwen3", head_dim=16)
    convert(source, tmp_path / "out")
    found, must_be_lossless = check_conversion(source, tmp_path / "out")
    assert found.lossless
    assert must_be_lossless
    other = save("qwen3", to="other", head_dim=16, rms_norm_eps=1e-2)
    assert not check_conversion(other, tmp_path / "out")[0].lossless
    with pytest.raises(UnsupportedInputError, match="not a finished conversion"):
        check_conversion(source, source)


def test_the_package_is_the_function() -> None:
    """Whichever was imported first."""
    import mlacompile.convert.lift

    assert callable(mlacompile.convert)
    assert "convert" in mlacompile.__all__
