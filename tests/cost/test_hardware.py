"""The table of hardware, and every way to put other figures in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlacompile.cost import hardware
from mlacompile.cost.hardware import TABLE, VARIABLE, find_hardware
from mlacompile.errors import OptionsError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_every_entry_says_where_its_figures_come_from() -> None:
    for key, entry in TABLE.items():
        assert entry.source.split()[0].strip(":,") in ("measured", "datasheet", "estimate"), key
        for kind in ("matmul", "heads", "masked", "latent"):
            for dtype in ("float64", "float32", "bfloat16", "float8_e4m3fn"):
                assert 0 < entry.rate(kind, dtype) <= entry.rate("matmul", dtype)
        assert entry.rate("masked", "bfloat16") < entry.rate("heads", "bfloat16")


def test_a_device_finds_its_entry() -> None:
    assert find_hardware(torch.device("cpu")).name == f"CPU, {torch.get_num_threads()} threads"
    assert hardware._of_gpu("NVIDIA H200", (9, 0)) is TABLE["h200"]
    assert hardware._of_gpu("NVIDIA H100 80GB HBM3", (9, 0)) is TABLE["h100"]
    assert hardware._of_gpu("NVIDIA A100-SXM4-80GB", (8, 0)) is TABLE["a100"]
    other = hardware._of_gpu("Some GPU", (8, 6))
    assert (other.name, other.bandwidth) == ("Some GPU", TABLE["a100"].bandwidth)
    assert VARIABLE in other.source


def test_the_environment_and_the_option_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "a100")
    assert find_hardware(torch.device("cpu")) is TABLE["a100"]
    assert find_hardware(torch.device("cpu"), "h100") is TABLE["h100"]


def test_a_file_changes_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "h100"\nbandwidth = 1e12\n[flops]\nbfloat16 = 5e14\n[share]\nlatent = 0.9\n')
    found = find_hardware(None, str(file))
    assert (found.name, found.bandwidth, found.latency) == ("mine", 1e12, TABLE["h100"].latency)
    assert found.rate("latent", "bfloat16") == pytest.approx(0.9 * 5e14)
    assert found.rate("heads", "float32") == TABLE["h100"].rate("heads", "float32")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bandwith = 1e12", r"unknown entry 'bandwith'; expected some of name, source, base"),
        ('base = "tpu"', r"base='tpu': expected one of h200"),
        ("bandwidth = -1", r"bandwidth = -1: expected a positive number"),
        ("[flops]\nbfloat16 = 'fast'", r"flops.bfloat16 = 'fast': expected a positive number"),
        ("[share]\nattention = 1", r"unknown share.attention; expected some of heads, masked, latent, expand, scatter"),
        ("= 3", r"mine.toml"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(OptionsError, match=expected):
        find_hardware(None, str(file))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(OptionsError, match=r"hardware='h300': expected one of 'h200', 'h100', 'a100', 'cpu'"):
        find_hardware(None, "h300")
