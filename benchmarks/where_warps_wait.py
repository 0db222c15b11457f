"""Where the partitions of a Hopper kernel of ``mla_decode`` spend a block: cycles between one wait and the next.

    python benchmarks/where_warps_wait.py 128x128x8192 --kernel gluon-fp8-paged --keep DIR      on a GPU with ncu
    python benchmarks/where_warps_wait.py --read DIR                                            what was kept, again

Nsight Compute samples what every warp is at. Each innermost loop with products is one partition's work on a block, and
is printed as the stretches between its waits, arrivals, copies and products: how many cycles a warp spends on its way
there, and at the instruction itself. A wait for a barrier in shared memory is counted with the jump back to it, other
waits where their result is needed first. Rows and kernels are those of ``mla_decode.py``. For kernels of one program
an SM, whose warps are all there all the time.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlacompile.testing.sass import innermost_loops

MARKS = re.compile(r"TRYWAIT|ARRIVE|DEPBAR|UTMALDG|BAR\.SYNC|FENCE|SHFL|STSM|REDUX|LDSM")
JUMP = re.compile(r"\bBRA\b.*?\b(0x[0-9a-f]+)")
SAMPLES, EXECUTED = "Warp Stall Sampling (All Samples)", "Instructions Executed"


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    samples: int
    executed: int


@dataclass(frozen=True)
class Profile:
    """A kernel's instructions, and how many cycles of a warp one sample stands for."""

    code: list[Instruction]
    cycles: float

    @classmethod
    def read(cls, folder: Path) -> Profile:
        """``source.csv`` and ``details.txt`` of that folder. ValueError: they are not what ncu writes."""
        lines = (folder / "source.csv").read_text().splitlines()
        first = next((i for i, line in enumerate(lines) if line.startswith('"Address"')), None)
        details = (folder / "details.txt").read_text()
        block = re.search(r"\((\d+), (\d+), (\d+)\)x\((\d+), 1, 1\)", details)
        active = re.search(r"SM Active Cycles\s+cycle\s+([\d,.]+)", details)
        if first is None or block is None or active is None:
            raise ValueError(f"{folder}: no table of instructions, no size of the launch or no active cycles in it")
        rows = csv.DictReader(lines[first:])
        code = [
            Instruction(int(row["Address"], 0), row["Source"].strip(), int(row[SAMPLES] or 0), int(row[EXECUTED] or 0))
            for row in rows
        ]
        samples = sum(one.samples for one in code)
        if not samples:
            raise ValueError(f"{folder}: no samples in it: the kernel is too short for the profiler, take a larger row")
        x, y, z, threads = map(int, block.groups())
        warps = x * y * z * threads // 32
        return cls(code, float(active[1].replace(",", "")) * warps / samples)

    def loops(self) -> list[list[Instruction]]:
        """Innermost loops that multiply."""
        at = {one.address: i for i, one in enumerate(self.code)}
        jumps = (
            (at.get(int(found[1], 0), i + 1), i) for i, one in enumerate(self.code) if (found := JUMP.search(one.text))
        )
        bodies = [self.code[begin : end + 1] for begin, end in innermost_loops(jumps)]
        return [body for body in bodies if any("GMMA" in one.text for one in body)]


def table(profile: Profile, body: list[Instruction]) -> str:
    """Cycles of one warp, once through the loop."""
    rounds = max(one.executed for one in body)

    def cycles(samples: int) -> float:
        return samples * profile.cycles / max(rounds, 1)

    lines = [f"{rounds} rounds of a warp, {cycles(sum(one.samples for one in body)):.0f} cycles each"]
    lines.append(f"{'before':>8s} {'at':>6s}")
    before, begins = 0, True
    for at, one in enumerate(body):
        if at and "TRYWAIT" in body[at - 1].text:
            continue  # the jump back to a wait that was not over, counted with it
        if MARKS.search(one.text) or (begins and "GMMA" in one.text):
            waited = body[at + 1].samples if "TRYWAIT" in one.text and at + 1 < len(body) else 0
            lines.append(f"{cycles(before):8.0f} {cycles(one.samples + waited):6.0f}  {one.text[:72]}")
            before = 0
        else:
            before += one.samples
        begins = "ARRIVE" in one.text or (begins and "GMMA" not in one.text)
    return "\n".join([*lines, f"{cycles(before):8.0f}         end"])


def profile_on_gpu(row: str, kernel: str, folder: Path) -> None:
    """Runs this file under ncu, which writes what ``Profile`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.ncu-rep"
    sections = [part for name in ("SourceCounters", "SpeedOfLight") for part in ("--section", name)]
    ncu = ["ncu", "--clock-control", "none", "-s", "2", "-c", "1", *sections, "-k", "regex:hopper", "-f"]
    subprocess.run([*ncu, "-o", str(report), sys.executable, __file__, row, "--kernel", kernel, "--call"], check=True)
    for page, name in ((["source", "--print-source", "sass", "--csv"], "source.csv"), (["details"], "details.txt")):
        shown = subprocess.run(["ncu", "-i", str(report), "--page", *page], check=True, capture_output=True, text=True)
        (folder / name).write_text(shown.stdout)


def call(row: str, kernel: str) -> None:
    """The kernel, a few times over."""
    from mla_decode import Contender, Pool, Row, make_call, queries

    parsed, contender = Row.parse(row), Contender(kernel)
    made = make_call(parsed, Pool(parsed.bytes() // 2).slices(parsed)[0], contender.paged, contender.kind)
    q = queries(parsed)
    run = contender.runner(parsed, q, contender.plan(parsed, made))
    for _ in range(4):
        run(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", help="heads x batch x context")
    parser.add_argument("--kernel", default="gluon-fp8-paged")
    parser.add_argument("--keep", type=Path, default=Path("profile"), help="a folder for what ncu writes")
    parser.add_argument("--read", type=Path, help="such a folder, instead of a run")
    parser.add_argument("--call", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        return call(arguments.row, arguments.kernel)
    if arguments.read is None:
        if not arguments.row:
            parser.error("a row (128x128x8192), or --read and a folder")
        profile_on_gpu(arguments.row, arguments.kernel, arguments.keep)
    profile = Profile.read(arguments.read or arguments.keep)
    print("\n\n".join(table(profile, body) for body in profile.loops()))


if __name__ == "__main__":
    main()
