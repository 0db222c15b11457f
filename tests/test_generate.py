"""``generate()`` of transformers with this backend, and the backend by its name with nothing imported."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from mlacompile import last_report
from mlacompile.testing.models import random_tokens, tiny_model
from mlacompile.testing.registration import ensure_registered

ROOT = Path(__file__).parent.parent


def generate(model: Any, **settings: Any) -> torch.Tensor:
    tokens = random_tokens(model.config, 2, 6)
    attend = torch.ones_like(tokens)
    attend[0, :2] = 0
    return model.generate(
        tokens, attention_mask=attend, do_sample=False, max_new_tokens=10, min_new_tokens=10, **settings
    )


def compile_config(**settings: Any) -> CompileConfig:
    config = CompileConfig(backend="mlacompile", **settings)
    config._compile_all_devices = True  # on a CPU, generate() does not compile otherwise
    return config


@pytest.fixture(autouse=True)
def _registered() -> None:
    ensure_registered()


def test_generate_on_a_static_cache_gives_the_same_tokens_twice() -> None:
    model = tiny_model("deepseek_v3", num_hidden_layers=2)
    want = generate(model)
    config = compile_config(mode=None, options={"rest": "eager"})
    for _ in range(2):
        got = generate(model, cache_implementation="static", compile_config=config)
        assert torch.equal(got, want)
    assert last_report().absorbed == 2


def test_the_mode_that_generate_passes_by_default_is_accepted() -> None:
    model = tiny_model("minicpm3", num_hidden_layers=1)
    config = compile_config()
    assert config.mode == "reduce-overhead"
    got = generate(model, cache_implementation="static", compile_config=config)
    assert torch.equal(got, generate(model))
    assert last_report().absorbed == 1


def metadata_of_an_installation(folder: Path) -> None:
    """What an installer would leave: the entry points of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"mlacompile-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mlacompile\nVersion: {project['version']}\n")
    points = project["entry-points"]["torch_dynamo_backends"]
    lines = ["[torch_dynamo_backends]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


PROGRAM = """
import torch
scaled = torch.nn.functional.scaled_dot_product_attention
up = torch.nn.Linear(8, 3 * 12)

def attend(q, c):
    k, v = up(c).view(2, 5, 3, 12).transpose(1, 2).split([6, 6], -1)
    return scaled(q, k, v)

q, c = torch.randn(2, 3, 1, 6), torch.randn(2, 5, 8)
with torch.no_grad():
    for options in ({"rest": "eager"}, {"rest": "eager", "form": "expanded"}):
        torch.compiler.reset()
        got = torch.compile(attend, backend="mlacompile", options=options)(q, c)
        assert (got - attend(q, c)).abs().max() < 1e-5
        import mlacompile
        print(mlacompile.last_report().summary())
"""


def run_program(program: str, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)


def test_the_name_is_enough_and_torch_logs_shows_the_decisions(tmp_path: Path) -> None:
    metadata_of_an_installation(tmp_path)
    done = run_program(PROGRAM, tmp_path, TORCH_LOGS="+mlacompile")
    assert done.stdout.split("\n")[:2] == ["1 absorbed, 0 expanded, 0 refused", "0 absorbed, 1 expanded, 0 refused"]
    assert "absorbed: 3 heads, rank 8, nope 6, rope 0, v 6" in done.stderr
    assert "recognize took" in done.stderr, "a plus asks for the time of every stage"
    assert "form='expanded' was asked for" in done.stderr


def test_without_torch_logs_nothing_is_printed(tmp_path: Path) -> None:
    metadata_of_an_installation(tmp_path)
    assert "mlacompile" not in run_program(PROGRAM, tmp_path).stderr
