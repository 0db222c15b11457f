"""How a figure is taken, and where it was taken: a time without its machine, versions and commit says nothing."""

from __future__ import annotations

import gc
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, and the 10th and 90th percentile, of ``calls`` calls."""

    median: float
    p10: float
    p90: float
    calls: int

    def to_dict(self) -> dict[str, float | int]:
        """The figures by name."""
        return asdict(self)

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarize single times (ms)."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(last * 0.1)], ordered[round(last * 0.9)], len(ordered))


def measure(
    step: Callable[[], Any],
    *,
    device: str | torch.device = "cpu",
    warmup: int = 3,
    calls: int = 20,
    max_calls: int = 2000,
    budget_s: float = 1.0,
) -> Timing:
    """Time ``step``: at least ``calls`` calls, more (to ``max_calls``) while they fit in ``budget_s``.

    On CUDA the calls follow each other without synchronisation, as in a decode loop, and events between them take the
    time: what is measured is whichever of host and device is slower. On a CPU it is wall time.
    """
    cuda = torch.device(device).type == "cuda"
    for _ in range(warmup):
        step()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    once = time.perf_counter() - start
    number = min(max_calls, max(calls, int(budget_s / max(once, 1e-6))))
    return Timing.of(_cuda_samples(step, number) if cuda else _wall_samples(step, number))


def _wall_samples(step: Callable[[], Any], number: int) -> list[float]:
    samples = []
    for _ in range(number):
        start = time.perf_counter()
        step()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def _cuda_samples(step: Callable[[], Any], number: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(number + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


REST_TIMES, LONGEST_REST_S = 8, 0.3  # rest after work, as a multiple of it
BUSY_MS = 40.0  # an H200 at full load lowered its clock from 1.77 to 1.5 GHz after 50 to 100 ms


def replayed_us(calls: Sequence[Callable[[], Any]], repeats: int = 5, *, rested: bool = False) -> float:
    """Microseconds a call of ``calls``, captured one after another into one CUDA graph: the median of some replays.

    Calls on different data, several times any L2 in all, find nothing cached. Each different call runs once before, so
    that whatever it compiles is compiled. rested: the device rests before, and replays end, after two at least, before
    it would slow down to save power: without that, a time depends on what was measured before it.
    """
    graph = _captured(calls)
    busy = _replay_ms(graph)
    if rested:
        time.sleep(min(REST_TIMES * busy / 1e3, LONGEST_REST_S))
    times: list[float] = []
    while len(times) < repeats and not (rested and len(times) >= 2 and sum(times) > BUSY_MS):
        times.append(_replay_ms(graph))
    return statistics.median(times) * 1e3 / len(calls)


def replayed_in_turns_us(several: Sequence[Sequence[Callable[[], Any]]], repeats: int = 5) -> list[float]:
    """The same for several lists of calls, replayed in turns: a GPU that gets warm gets slower for all alike."""
    graphs = [_captured(calls) for calls in several]
    times: list[list[float]] = [[] for _ in several]
    for _ in range(repeats):
        for graph, taken in zip(graphs, times, strict=True):
            taken.append(_replay_ms(graph))
    return [statistics.median(ms) * 1e3 / len(calls) for ms, calls in zip(times, several, strict=True)]


def _captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, which has run once."""
    for call in dict.fromkeys(calls):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    graph.replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def free_memory() -> None:
    """Drop compiled code, its CUDA graphs and every cached block, so that the next measurement starts from nothing."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What a result has to say about where it comes from: device, versions, commit."""
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "transformers": version_of("transformers"),
        "mlacompile": version_of("mlacompile"),
        "commit": git_commit(),
    }
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        found |= {"capability": f"sm_{major}{minor}", "cuda": torch.version.cuda}
    return found


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str | None:
    """The commit this file belongs to, with a plus if the tree has changes, or None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
