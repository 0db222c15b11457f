"""What is read off a profile of a kernel whose partitions wait for each other."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="loops are found as in compiled kernels, which Triton brings")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HEADER = '"Address","Source","Warp Stall Sampling (All Samples)","Instructions Executed"'
#: (instruction, samples, executed): a loop of 100 rounds of a warp inside a loop of 2, and one without products.
CODE = [
    ("MOV R1, R2", 3, 2),
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R4", 4, 100),
    ("@!P1  BRA 0x900", 16, 100),
    ("FADD R1, R2, R3", 10, 100),
    ("WARPGROUP.ARRIVE", 0, 100),
    ("QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", 5, 100),
    ("QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24", 5, 100),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 20, 100),
    ("FMUL R1, R2, R3", 30, 100),
    ("@P2  BRA 0x110", 10, 100),
    ("@P3  BRA 0x100", 7, 2),
    ("@P4  BRA 0x1b0", 90, 400),
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import where_warps_wait

    return where_warps_wait


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """200 samples of two programs of 64 threads, 500 cycles each: a sample is 10 cycles of a warp."""
    rows = [
        f'"{0x100 + 16 * i:#x}","{text}","{samples}","{executed}"' for i, (text, samples, executed) in enumerate(CODE)
    ]
    (tmp_path / "source.csv").write_text("\n".join(['"Kernel Name","_some_kernel"', HEADER, *rows]))
    details = "  _some_kernel (2, 1, 1)x(64, 1, 1), Context 1\n    SM Active Cycles   cycle   500.00\n"
    (tmp_path / "details.txt").write_text(details)
    return tmp_path


def test_cycles_between_waits(
    script: Any, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["where_warps_wait.py", "--read", str(kept)])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "100 rounds of a warp, 10 cycles each"
    found = [(float(line[:8]), line[8:15].strip(), line[15:].split()) for line in lines[2:]]
    assert [(before, at, words[0].split(".")[0]) for before, at, words in found] == [
        (0, "2", "SYNCS"), (1, "0", "WARPGROUP"), (0, "0", "QGMMA"), (0, "2", "WARPGROUP"), (4, "", "end"),
    ]  # fmt: skip


def test_other_files_are_refused(script: Any, kept: Path) -> None:
    (kept / "source.csv").write_text(f'{HEADER}\n"0x100","MOV R1, R2","0","2"')
    with pytest.raises(ValueError, match="no samples"):
        script.Profile.read(kept)
    (kept / "details.txt").write_text("==ERROR== no kernels were profiled")
    with pytest.raises(ValueError, match="no size of the launch"):
        script.Profile.read(kept)
