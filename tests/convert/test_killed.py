"""A conversion that compresses and heals, killed at ten random moments: the same bytes as one that nobody disturbed."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlacompile.convert import convert
from tests.convert.conftest import contents, with_tokenizer, write_text

_OPTIONS: dict[str, Any] = {"kv_budget": 0.3, "heal_steps": 12, "max_shard_bytes": 60_000}


def _run(source: Path, out: Path, text: Path) -> None:
    import torch

    torch.set_num_threads(1)
    convert(source, out, calibrate=text, **_OPTIONS)


def test_compressed_and_healed_in_spite_of_being_killed_at_ten_random_moments(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    source, text = with_tokenizer(save()), write_text(tmp_path / "text.txt", 5000)
    # A fork of a process that has trained cannot train, so children come from one that has only imported.
    fresh = multiprocessing.get_context("forkserver")
    pictures = ["matplotlib.figure", "matplotlib.backends.backend_svg"]
    fresh.set_forkserver_preload(
        ["mlacompile.convert.conversion", "transformers.models.llama.modeling_llama", *pictures]
    )

    def begin(out: Path) -> Any:
        child = fresh.Process(target=_run, args=(source, out, text))
        child.start()
        return child

    whole = begin(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    moments, reach, out = random.Random(2), 1.0, tmp_path / "out"
    killed, taken_up, half_healed = 0, 0, 0
    while killed < 10 or not out.exists():
        if out.exists():
            out = tmp_path / f"{out.name}+"  # one that came to its end before its moment counts for nothing
        scratch = tmp_path / f"{out.name}.partial" / "scratch"
        taken_up += bool(list(scratch.glob("layer-*.safetensors")))
        half_healed += (scratch / "healing.safetensors").exists()
        child = begin(out)
        if killed < 10:
            child.join(moments.uniform(0, reach))
            child.kill()
        child.join()
        assert child.exitcode in (0, -9)
        died = child.exitcode != 0
        killed += died
        # Moments that fall into the work, however slow the machine is and however far the work has come.
        reach *= 1.3 if died else 0.6
        assert not out.exists() or contents(out) == contents(tmp_path / "whole")
    assert taken_up
    assert half_healed
    for left in tmp_path.glob("*.partial"):  # by one that was killed when its folder had its name
        assert left.with_suffix("").exists()
        assert not (left / "files").exists()
