"""Where attention on the latent stops being the cheaper form: both forms and the cost model's pick, measured side
by side.

One attention of V3's and of V2-Lite's shape, its products with the up-projections included, causal, on a cache of
so many
tokens of which the queries are the last. Every form is the very code that a compiled graph calls. On a GPU a CUDA
graph of
several calls, each on another cache, is replayed between events; on a CPU it is wall time.

    python benchmarks/crossover.py                          the whole table, on a GPU: under two minutes
    python benchmarks/crossover.py --device cpu --shapes tiny --contexts 64,128 --queries 1,8,64
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mlacompile.ops  # noqa: F401  (registers what the forms call)
from mlacompile.cost import Hardware, border, find_hardware, predict
from mlacompile.cost.hardware import TABLE
from mlacompile.cost.predict import chunk_tokens
from mlacompile.geometry import MLAGeometry
from mlacompile.kernels.mla_prefill.chunked import mla_prefill_chunked
from mlacompile.testing.timing import environment, replayed_in_turns_us

SHAPES = {
    "v3": MLAGeometry(heads=128, rank=512, nope=128, rope=64, v=128),
    "v2-lite": MLAGeometry(heads=16, rank=512, nope=128, rope=64, v=128),
    "tiny": MLAGeometry(heads=4, rank=64, nope=16, rope=8, v=16),
}
FORMS = ("absorbed", "chunked", "auto")
COLD_BYTES = 256 << 20  # the caches of one replay are several times any L2
REPLAY_S = 4e-3  # about how long one replay should take
RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One measurement: microseconds a call. auto: what the cost model picked, and the time of that pick."""

    shape: str
    context: int
    queries: int
    form: str
    us: float
    predicted_us: float
    picked: str | None = None


@dataclass
class Border:
    """Queries at which both forms take as long: predicted, and measured (None where no form overtakes the other)."""

    shape: str
    context: int
    predicted: int
    measured: float | None
    ratio: float | None
    worst_auto: float  # time of auto over that of the better form, at worst


class Inputs:
    """Random queries, weights and a pool of caches for one geometry."""

    def __init__(self, geometry: MLAGeometry, queries: int, context: int, count: int, dtype: torch.dtype, device: str):
        g, draw = geometry, torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device, dtype=torch.float32).to(dtype)

        self.geometry, self.queries, self.context = geometry, queries, context
        self.q = random(1, queries, g.heads, g.nope + g.rope).transpose(1, 2)
        self.up = random(g.heads, g.nope + g.v, g.rank) / g.rank**0.5
        self.caches = [random(1, context, g.latent_width) for _ in range(count)]

    def call(self, absorb_up_to: int, i: int = 0) -> Tensor:
        """Attention on the ``i``-th cache, on the latent if there are no more queries than ``absorb_up_to``."""
        g, cache = self.geometry, self.caches[i % len(self.caches)]
        c_kv, k_pe = cache.split([g.rank, g.rope], -1)
        out, _ = mla_prefill_chunked(
            *(self.q, c_kv, k_pe, self.up[:, : g.nope], self.up[:, g.nope :], None, None, None),
            scale=(g.nope + g.rope) ** -0.5,
            causal=True,
            nope_at=0,
            pe_at=g.nope,
            chunk=chunk_tokens(g, self.q.element_size()),
            absorb_up_to=absorb_up_to,
        )
        return out


def measure(several: list[tuple[Callable[[int], Any], int]], repeats: int, device: str) -> list[float]:
    """Microseconds a call of each, the median of ``repeats`` rounds of so many calls; all take turns."""
    if device == "cuda":
        return replayed_in_turns_us([[partial(call, i) for i in range(calls)] for call, calls in several], repeats)
    times: list[list[float]] = [[] for _ in several]
    for call, _ in several:
        call(0)
    for _ in range(repeats):
        for (call, calls), taken in zip(several, times, strict=True):
            begin = time.perf_counter()
            for i in range(calls):
                call(i)
            taken.append((time.perf_counter() - begin) / calls * 1e6)
    return [statistics.median(taken) for taken in times]


def run(args: argparse.Namespace, hardware: Hardware) -> Iterator[Row]:
    """All measurements of one invocation."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    for shape in args.shapes:
        geometry = SHAPES[shape]
        for context in args.contexts:
            limit = border(geometry, 1, context, name, hardware, "chunked")
            for queries in (q for q in args.queries if q <= context):
                sizes: dict[str, Any] = {"batch": 1, "queries": queries, "context": context, "dtype": name}
                seconds = {f: predict(f, geometry, hardware=hardware, **sizes).seconds for f in FORMS[:2]}
                one = context * geometry.latent_width * dtype.itemsize
                count = max(1, min(math.ceil(COLD_BYTES / one), 64)) if args.device == "cuda" else 2
                inputs = Inputs(geometry, queries, context, count, dtype, args.device)
                check(inputs, queries)
                limits = {"absorbed": queries, "chunked": 0}
                calls = {form: max(1, min(count, int(REPLAY_S / seconds[form]))) for form in limits}
                work: list[tuple[Callable[[int], Any], int]] = [
                    (partial(inputs.call, most), calls[form]) for form, most in limits.items()
                ]
                us = dict(zip(limits, measure(work, args.repeats, args.device), strict=True))
                picked = "absorbed" if queries <= limit else "chunked"
                for form in limits:
                    yield Row(shape, context, queries, form, us[form], seconds[form] * 1e6)
                check_pick(inputs, limit, limits[picked])
                yield Row(shape, context, queries, "auto", us[picked], seconds[picked] * 1e6, picked)


def again(measured: dict[str, Any], hardware: Hardware, name: str) -> Iterator[Row]:
    """The times of an earlier run with predictions and picks by the rates of today; a pick's time is its form's."""
    times = {(r["shape"], r["context"], r["queries"], r["form"]): r["us"] for r in measured["results"]}
    for (shape, context, queries, form), us in times.items():
        geometry = SHAPES[shape]
        limit = border(geometry, 1, context, name, hardware, "chunked")
        picked = form if form != "auto" else "absorbed" if queries <= limit else "chunked"
        sizes: dict[str, Any] = {"batch": 1, "queries": queries, "context": context, "dtype": name}
        predicted = predict(picked, geometry, hardware=hardware, **sizes).seconds * 1e6
        us = times[shape, context, queries, picked]
        yield Row(shape, context, queries, form, us, predicted, picked if form == "auto" else None)


def check_pick(inputs: Inputs, limit: int, most: int) -> None:
    """The op picks what it is said to: the same launches give the same bits.

    They are not timed again: where their memory lay made up to 8 % of 30 µs, more than the question is about.
    """
    if not torch.equal(inputs.call(limit), inputs.call(most)):
        raise SystemExit(f"{inputs.geometry}: with a limit of {limit} queries the op does not do what {most} gives")


def check(inputs: Inputs, queries: int) -> None:
    """Both forms agree as far as the dtype allows.

    Sixteen bits: a handful of tensors are rounded to them on either way. float32: sums of ``rank`` products,
    whose roundings
    add up like a random walk.
    """
    one, other = inputs.call(queries).float(), inputs.call(0).float()
    error = float((one - other).abs().max() / other.abs().max())
    steps = 4.0 if inputs.q.dtype.itemsize == 2 else 4.0 * inputs.geometry.rank**0.5
    allowed = steps * torch.finfo(inputs.q.dtype).eps
    if not error <= allowed:
        where = f"{inputs.geometry}, {queries} queries"
        raise SystemExit(f"{where}: the forms differ by {error:.1e} (allowed {allowed:.1e})")


def borders(rows: list[Row], hardware: Hardware, dtype: str) -> list[Border]:
    """Where the measured times of the forms cross, next to the prediction."""
    found = []
    for shape, context in dict.fromkeys((r.shape, r.context) for r in rows):
        times: dict[str, dict[int, float]] = {form: {} for form in FORMS}
        for row in rows:
            if (row.shape, row.context) == (shape, context):
                times[row.form][row.queries] = row.us
        predicted = border(SHAPES[shape], 1, context, dtype, hardware, "chunked")
        crossed = crossing(times["absorbed"], times["chunked"])
        best = {q: min(times["absorbed"][q], times["chunked"][q]) for q in times["auto"]}
        worst = max(times["auto"][q] / best[q] for q in best)
        ratio = None if crossed is None or not predicted else max(crossed / predicted, predicted / crossed)
        found.append(Border(shape, context, predicted, crossed, ratio, worst))
    return found


def crossing(one: dict[int, float], other: dict[int, float]) -> float | None:
    """Where two curves over the same points meet, straight between points on logarithmic axes."""
    points = sorted(one)
    gaps = [math.log(one[q] / other[q]) for q in points]
    for (a, b), (before, after) in zip(pairwise(points), pairwise(gaps), strict=True):
        if before <= 0 < after:
            share = before / (before - after)
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return None


def compile_ahead(args: argparse.Namespace) -> None:
    """Compile the kernels of all shapes in processes of their own, into the cache on disk that this one then
    reads."""
    ends = (min(args.contexts), max(args.contexts))
    work = [(s, c, q) for s in args.shapes for c in ends for q in args.queries if q <= c]
    with ProcessPoolExecutor(min(args.workers, len(work)), mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(compile_one, *one) for one in work]:
            done.result()


def compile_one(shape: str, context: int, queries: int) -> None:
    """Run one absorbed call, for the sake of its kernels."""
    Inputs(SHAPES[shape], queries, context, 1, torch.bfloat16, "cuda").call(queries)
    torch.cuda.synchronize()


def rates(rows: list[Row], hardware: Hardware, dtype: str) -> dict[str, float]:
    """What share of the peak rate each kind of attention reached at the longest query and context: for the table."""
    found = {}
    for kind, form in (("latent", "absorbed"), ("heads", "chunked")):
        mine = [r for r in rows if r.form == form]
        if mine:
            row = max(mine, key=lambda r: (r.context * r.queries, SHAPES[r.shape].heads))
            g = SHAPES[row.shape]
            sizes: dict[str, Any] = {"batch": 1, "queries": row.queries, "context": row.context, "dtype": dtype}
            total = predict(form, g, hardware=hardware, **sizes)
            width = 2 * g.rank + g.rope if kind == "latent" else g.nope + g.rope + g.v
            hidden = 0 if kind == "latent" else (row.queries - 1) / 2  # of each query, on average, and not computed
            pairs = row.queries * (row.context - hidden)
            attention = 2 * g.heads * pairs * width
            rest = total.seconds - attention / hardware.rate(kind, dtype)
            found[kind] = attention / max(row.us * 1e-6 - rest, 1e-9) / hardware.rate("matmul", dtype)
    return found


def plot(rows: list[Row], found: list[Border], target: Path, title: str) -> None:
    """Time over queries, a panel a shape and context, with the predicted border."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.6), squeeze=False)
    for axes, at in zip(panels[0], found, strict=True):
        mine = [r for r in rows if (r.shape, r.context) == (at.shape, at.context)]
        for form, style in (("absorbed", "o-"), ("chunked", "s-"), ("auto", "k:")):
            some = [r for r in mine if r.form == form]
            axes.plot([r.queries for r in some], [r.us for r in some], style, label=form, markersize=4)
            if form != "auto":
                axes.plot([r.queries for r in some], [r.predicted_us for r in some], "-", color="grey", linewidth=0.7)
        axes.axvline(max(at.predicted, 1), color="red", linewidth=0.8, label=f"predicted border {at.predicted}")
        axes.set(xscale="log", yscale="log", xlabel="queries", ylabel="µs", title=f"{at.shape}, context {at.context}")
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, write JSON and plot."""
    args = _arguments()
    earlier = json.loads(args.earlier.read_text()) if args.earlier else None
    hardware = (
        find_hardware(torch.device(args.device), args.hardware) if earlier is None else _hardware_of(earlier, args)
    )
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    if args.device == "cuda" and args.workers and earlier is None:
        compile_ahead(args)
    rows: list[Row] = []
    print(f"{'shape':8} {'context':>7} {'queries':>7} {'form':9} {'µs':>10} {'predicted':>10}")
    for row in run(args, hardware) if earlier is None else again(earlier, hardware, dtype):
        rows.append(row)
        times = f"{row.us:10.1f} {row.predicted_us:10.1f}" + (f"  picked {row.picked}" if row.picked else "")
        print(f"{row.shape:8} {row.context:7} {row.queries:7} {row.form:9} {times}", flush=True)
    found = borders(rows, hardware, dtype)
    print(f"\n{'shape':8} {'context':>7} {'predicted':>9} {'measured':>9} {'ratio':>6} {'auto/best':>9}")
    for at in found:
        measured, ratio = ("–" if x is None else f"{x:.4g}" for x in (at.measured, at.ratio))
        print(f"{at.shape:8} {at.context:7} {at.predicted:9} {measured:>9} {ratio:>6} {at.worst_auto:9.3f}")
    shares = rates(rows, hardware, dtype)
    table = dict(hardware.share)
    print(
        "shares of the peak:",
        ", ".join(f"{kind} {share:.2f} (table {table[kind]:.2f})" for kind, share in shares.items()),
    )
    about = environment() if earlier is None else earlier["environment"] | {"predicted_at": environment()["commit"]}
    about |= {"commit": args.commit} if args.commit else {}
    slug = "-".join((about["device"] if args.device == "cuda" else "cpu").lower().split())
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / f"crossover-{slug}.json"
    data = {"environment": about, "hardware": hardware.to_dict(), "borders": [asdict(b) for b in found]}
    out.write_text(json.dumps(data | {"shares": shares, "results": [asdict(r) for r in rows]}, indent=1) + "\n")
    if not args.no_plot:
        title = f"{about['device']}, torch {about['torch']}, commit {about['commit']}"
        plot(rows, found, out.with_suffix(".png"), title)
    print(out)


def _hardware_of(earlier: dict[str, Any], args: argparse.Namespace) -> Hardware:
    """The entry of the table for the device of an earlier run, as it is today."""
    name = earlier["hardware"]["name"]
    return next((h for h in TABLE.values() if h.name == name), None) or find_hardware(None, args.hardware)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"type": lambda text: [int(n) for n in text.split(",")]}
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--shapes", default=["v3", "v2-lite"], type=lambda text: text.split(","), help=", ".join(SHAPES)
    )
    parser.add_argument("--contexts", default=[1024, 8192, 32768], **numbers)  # type: ignore[arg-type]
    parser.add_argument("--queries", default=[1, 4, 16, 64, 256, 512, 1024, 4096], **numbers)  # type: ignore[arg-type]
    parser.add_argument("--hardware", help="rates for the prediction: a name of the table or a TOML file")
    parser.add_argument(
        "--from", dest="earlier", type=Path, help="JSON of an earlier run: its times, and predictions by today's rates"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile ahead; 0: none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    parser.add_argument("--commit", help="the commit to name in the results, where the tree has no git")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.shapes) - SHAPES.keys():
        parser.error(f"--shapes {','.join(sorted(unknown))}: expected some of {', '.join(SHAPES)}")
    if args.device == "cuda" and not torch.cuda.is_available() and not args.earlier:
        parser.error("no CUDA device here; --device cpu measures on the CPU")
    return args


if __name__ == "__main__":
    with torch.no_grad():
        main()
    sys.stdout.flush()
