"""What packaging, README and Makefile promise: they have to agree with each other and with the code."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlacompile

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_said_once_and_the_same() -> None:
    assert mlacompile.__version__ == PROJECT["version"]


def test_entry_points_lead_to_something_callable() -> None:
    for target in (PROJECT["scripts"]["mlacompile"], *PROJECT["entry-points"]["torch_dynamo_backends"].values()):
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_import_is_light() -> None:
    heavy = "('transformers', 'triton', 'onnx', 'onnxruntime', 'vllm', 'torch_tensorrt', 'matplotlib')"
    program = f"import sys, mlacompile, mlacompile.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_dependency_has_a_tested_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.replace("-", "_").split("==") for line in lines)
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=\[; ]", want)[0].replace("-", "_") for want in wanted}
    assert names <= pins.keys()
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())


@pytest.mark.parametrize("script", ["readme_table.py", "convert_table.py"])
def test_pages_show_the_committed_results(script: str) -> None:
    done = subprocess.run([sys.executable, f"benchmarks/{script}", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_readme_names_every_option_and_every_command() -> None:
    from mlacompile.cli import app
    from mlacompile.options import Options

    readme = (ROOT / "README.md").read_text()
    for option in Options.__dataclass_fields__:
        assert f"| `{option}` |" in readme
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"mlacompile {command.callback.__name__}" in readme


def test_readme_links_lead_somewhere() -> None:
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_make_uses_a_given_interpreter_and_installs_nothing() -> None:
    done = subprocess.run(
        ["make", "-n", "VENV=", "PYTHON=some-python", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "some-python -m pytest" in done.stdout
    assert "pip" not in done.stdout
