"""Kernels that write the clock, and the timeline that is read off what they wrote."""

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="copied kernels are compiled by Triton, which the dev extra brings")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPILE = """
import mlacompile
import torch
from mlacompile.kernels.mla_decode.hopper_launch import hopper_launches, hopper_shape
from mlacompile.kernels.mla_decode.plan import Device, hopper_plan
from mlacompile.testing.sass import compile_for

def meta(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")

cache = meta(2, 4096, 576)
tensors = (meta(2, 16, 1, 512), meta(2, 16, 1, 64), cache[..., :512], cache[..., 512:], None, None, None, None)
plan = hopper_plan(hopper_shape(tensors), Device())
out, lse = meta(2, 16, 1, 512), meta(2, 16, 1, dtype=torch.float32)
for launch in hopper_launches(tensors, out, lse, plan, scale=0.1, causal=False):
    built = compile_for(launch.kernel, launch.arguments, launch.options, capability=90, name="stamped")
    print(built.counts["HGMMA"], mlacompile.__file__)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import timeline

    return timeline


def test_a_stamp_stands_behind_every_wait_and_compiles(script: Any, tmp_path: Path) -> None:
    sites = script.copied(tmp_path)
    behind = 0
    for path in (tmp_path / "mlacompile" / script.KERNELS).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
                texts = [ast.unparse(x) for x in body] if isinstance(body, list) else []
                for text, after in itertools.pairwise([*texts, ""]):
                    if text.startswith("mbarrier.wait(") and path.stem.startswith("hopper"):
                        assert after.startswith("_stamp("), f"{path.name}: {text}"
                        number = int(after.removeprefix("_stamp(").removesuffix(")"))
                        assert sites[number].endswith(text)
                        behind += 1
    assert behind > 30
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "STAMPS_ADDRESS": "4096"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    products, compiled = done.stdout.splitlines()[0].split()
    assert int(products) > 0
    assert compiled.startswith(str(tmp_path)), "not the copy"


def test_a_timeline_counts_from_the_wait_for_earlier_kernels(script: Any) -> None:
    never = [0xFFFFFFFF, 0, 0]
    sites = ["hopper._some_kernel: _wait_for_earlier()", "hopper._left: mbarrier.wait(a)", "merge._m_kernel: end"]

    def program(late: int) -> list[list[list[int]]]:
        """Four warps wait for earlier kernels, eight wait for a, twice: those of the second partition 500 ns later."""
        begin = 10_000 + late
        waits = [[begin + 1000 + 500 * (w // 4), begin + 3000 + 500 * (w // 4), 2] for w in range(8)]
        return [
            [[begin, begin, 1] if w < 4 else never for w in range(script.WARPS)],
            [waits[w] if w < 8 else never for w in range(script.WARPS)],
            [never for _ in range(script.WARPS)],
        ]

    found = script.passings([program(0), program(0), program(100)], sites)
    assert [(x.first, x.last, x.latest, x.times, x.warps) for x in found] == [
        (0.0, 0.0, 0.1, 1.0, (0, 3)), (1.0, 3.0, 3.1, 2.0, (0, 3)), (1.5, 3.5, 3.6, 2.0, (4, 7)),
    ]  # fmt: skip
    assert "mbarrier.wait(a)" in script.table(found).splitlines()[2]


def test_no_stamps_are_an_error(script: Any) -> None:
    with pytest.raises(ValueError, match="no program has written"):
        script.passings([], ["hopper._some_kernel: _wait_for_earlier()"])
