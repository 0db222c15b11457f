"""When the warps of a Hopper kernel of ``mla_decode`` pass their barriers: a timeline of one call, on a GPU.

    python benchmarks/timeline.py 128x1x8192 --kernel gluon-fp8-paged            rows and kernels as in mla_decode.py

Where ``where_warps_wait.py`` says what a block of a long row takes, this says what a short call is made of, in a CUDA
graph, with caches as cold as they are in ``mla_decode.py``. A copy of the package is made whose kernels write the GPU's
clock behind every wait and arrival, and runs in a process of its own. Times are microseconds since a program's wait for
earlier kernels was over, medians over programs: of the first time that a place is passed and of the last. Stamps cost
registers and time, so a copy is slower than what it copies.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent / "mlacompile"
KERNELS = Path("kernels") / "mla_decode"
PROGRAMS, WARPS = 2048, 20
ZERO = "_wait_for_earlier()"
NOISE_US = 0.1  # warps that differ by less are one line

STAMPS = '''"""Writes the clock: made by benchmarks/timeline.py."""
import os

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _code(site):
    return (
        "{ .reg .pred p; .reg .u32 t, l, n, c; .reg .u64 a, b; mov.u32 t, %globaltimer_lo; "
        "mov.u32 l, %laneid; setp.eq.u32 p, l, 0; "
        "mov.u32 c, %ctaid.z; mov.u32 n, %nctaid.y; mov.u32 l, %ctaid.y; mad.lo.u32 c, c, n, l; "
        "mov.u32 n, %nctaid.x; mov.u32 l, %ctaid.x; mad.lo.u32 c, c, n, l; "
        "mov.u32 l, %tid.x; shr.u32 l, l, 5; "
        f"mad.lo.u32 c, c, SITES, {site}; mad.lo.u32 c, c, WARPS, l; "
        f"mul.wide.u32 a, c, 12; mov.u64 b, {int(os.environ['STAMPS_ADDRESS'])}; add.u64 a, a, b; "
        "@p red.global.min.u32 [a], t; @p red.global.max.u32 [a+4], t; @p red.global.add.u32 [a+8], 1; "
        "mov.u32 $0, 0; }"
    )


@gluon.jit
def _stamp(SITE: gl.constexpr):
    gl.inline_asm_elementwise(_code(SITE), "=r", [], dtype=gl.int32, is_pure=False, pack=1)
'''


class Stamper(ast.NodeTransformer):
    """Adds a stamp behind waits and arrivals, and where a kernel ends. ``sites``: what each stamp stands behind."""

    def __init__(self, module: str, sites: list[str]) -> None:
        self.module, self.sites, self.function = module, sites, ""

    def _stamp(self, label: str) -> ast.stmt:
        self.sites.append(f"{self.module}.{self.function}: {label}")
        return ast.parse(f"_stamp({len(self.sites) - 1})").body[0]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.function = node.name
        self.generic_visit(node)
        if node.name.endswith("_kernel"):
            node.body.append(self._stamp("end"))
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | list[ast.stmt]:
        text = ast.unparse(node)
        if text.startswith(("mbarrier.wait(", "mbarrier.arrive(")) or text == ZERO:
            return [node, self._stamp(text)]
        return node


def stamped(source: str, module: str, sites: list[str]) -> str:
    """A kernel's module that writes the clock."""
    before = len(sites)
    tree = Stamper(module, sites).visit(ast.parse(source))
    if len(sites) == before:
        return source
    last = max(i for i, node in enumerate(tree.body) if isinstance(node, ast.Import | ast.ImportFrom))
    tree.body[last + 1 : last + 1] = ast.parse("from mlacompile.kernels.mla_decode.stamps import _stamp").body
    return ast.unparse(ast.fix_missing_locations(tree))


def copied(to: Path) -> list[str]:
    """A copy of the package, in that folder, whose kernels write the clock. Returns what each stamp stands behind."""
    shutil.copytree(PACKAGE, to / "mlacompile", ignore=shutil.ignore_patterns("__pycache__"))
    sites: list[str] = []
    for path in sorted((to / "mlacompile" / KERNELS).glob("*.py")):
        if path.stem.startswith(("hopper", "merge")):
            path.write_text(stamped(path.read_text(), path.stem, sites))
    stamps = STAMPS.replace("SITES", str(len(sites))).replace("WARPS", str(WARPS))
    (to / "mlacompile" / KERNELS / "stamps.py").write_text(stamps)
    return sites


@dataclass(frozen=True)
class Passing:
    """Of four warps and one site, in microseconds: medians over programs, and the latest of all."""

    first: float
    last: float
    latest: float
    times: float
    warps: tuple[int, int]
    site: str

    def like(self, other: Passing) -> bool:
        """Whether these are four warps more of the same partition."""
        near = abs(self.first - other.first) < NOISE_US and abs(self.last - other.last) < NOISE_US
        return near and self.site == other.site and self.times == other.times and other.warps[1] + 1 == self.warps[0]


def passings(records: Any, sites: list[str]) -> list[Passing]:
    """Timeline of ``[programs, sites, WARPS, 3]``: the clock's first and last, and how often a warp passed.

    ValueError: no program has waited for earlier kernels, so there is nothing to count from.
    """
    zeros = {i for i, site in enumerate(sites) if site.endswith(ZERO) and not site.startswith("merge")}
    begun = [int(warp[0]) for program in records for i in zeros for warp in program[i] if warp[2]]
    if not begun:
        raise ValueError("no program has written the clock: was the copy's kernel launched?")
    zero = statistics.median_low(begun)
    found: list[Passing] = []
    for i, site in enumerate(sites):
        for first in range(0, WARPS, 4):
            some = [[w for w in program[i][first : first + 4] if w[2]] for program in records]
            some = [warps for warps in some if warps]
            if not some:
                continue
            begins, ends = _us(some, 0, min, zero), _us(some, 1, max, zero)
            times = statistics.median(w[2] for warps in some for w in warps)
            one = Passing(
                statistics.median(begins), statistics.median(ends), max(ends), float(times), (first, first + 3), site
            )
            if found and one.like(found[-1]):
                found[-1] = replace(found[-1], warps=(found[-1].warps[0], one.warps[1]))
            else:
                found.append(one)
    return sorted(found, key=lambda one: one.first)


def _us(some: list[list[Any]], which: int, of: Callable[[Iterable[int]], int], zero: int) -> list[float]:
    """One of a program's clocks, the earliest or the latest of its warps, since zero."""
    return [(of(int(w[which]) for w in warps) - zero) / 1e3 for warps in some]


def table(found: list[Passing]) -> str:
    """As text."""
    lines = [f"{'first':>8s} {'last':>8s} {'latest':>8s} {'times':>6s}  warps  behind"]
    for one in found:
        warps = f"{one.warps[0]}-{one.warps[1]}"
        lines.append(
            f"{one.first:8.2f} {one.last:8.2f} {one.latest:8.2f} {one.times:6.0f}  {warps:5s}  {one.site[:90]}"
        )
    return "\n".join(lines)


def call(row: str, kernel: str, sites: list[str]) -> list[Passing]:
    """Runs the copy: calls on other data, then the one that is looked at, in one CUDA graph."""
    import torch

    records = torch.zeros(PROGRAMS, len(sites), WARPS, 3, dtype=torch.int32, device="cuda")
    os.environ["STAMPS_ADDRESS"] = str(records.data_ptr())
    from mla_decode import COLD_BYTES, Contender, Pool, Row, make_call, queries

    parsed, contender = Row.parse(row), Contender(kernel)
    pool = Pool(int(1.1 * max(parsed.bytes(), 2 * COLD_BYTES)) // 2)
    calls = [make_call(parsed, tokens, contender.paged, contender.kind) for tokens in pool.slices(parsed)]
    run = contender.runner(parsed, queries(parsed), contender.plan(parsed, calls[0]))
    for one in calls[:2]:
        run(one)
    torch.cuda.synchronize()
    fresh = torch.zeros_like(records)
    fresh[..., 0] = -1  # the largest number without a sign
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in calls[1:]:
            run(one)
        records.copy_(fresh)
        run(calls[0])
    graph.replay()
    torch.cuda.synchronize()
    used = records[records[..., 2].flatten(1).sum(1) > 0].cpu().to(torch.int64) & 0xFFFFFFFF
    return passings(used.tolist(), sites)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", help="heads x batch x context")
    parser.add_argument("--kernel", default="gluon-fp8-paged")
    parser.add_argument("--out", type=Path, help="write the timeline as JSON")
    parser.add_argument("--commit", help="what is measured: the copy has no git")
    parser.add_argument("--sites", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sites:
        found = call(arguments.row, arguments.kernel, json.loads(Path(arguments.sites).read_text()))
        print(table(found))
        if arguments.out:
            from mlacompile.testing.timing import environment

            where = {**environment(), "commit": arguments.commit, "row": arguments.row, "kernel": arguments.kernel}
            result = {"environment": where, "timeline": [asdict(one) for one in found]}
            arguments.out.write_text(json.dumps(result, indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        sites = Path(folder) / "sites.json"
        sites.write_text(json.dumps(copied(Path(folder))))
        variables = {**os.environ, "PYTHONPATH": folder, "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--sites", str(sites)], env=variables, check=True)


if __name__ == "__main__":
    main()
