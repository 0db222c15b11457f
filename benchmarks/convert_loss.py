"""What a smaller cache costs: perplexity and divergence of the baseline, of ours, and of ours with each idea left out.

    python benchmarks/convert_loss.py MODEL --calibrate wiki_cal.txt --evaluate wiki_test.txt lee.txt --work DIR \\
        --result benchmarks/results/convert-loss-cpu.json [--runs NAME ...]

Fitting sees the calibration text only, and what is chosen, layer by layer, is chosen on its last tenth. The texts
to evaluate on are cut into windows of 1024, of which 12 spread evenly are read; weights are rounded to bfloat16, losses
computed in float32. Layers are kept in DIR, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.convert.attend import GroupedAttention, LatentAttention
from mlacompile.convert.compression import (
    Budget,
    Calibration,
    Evaluation,
    compress,
    engine_frequencies,
    evaluate,
    read_ids,
)
from mlacompile.convert.effort import EFFORTS, Effort
from mlacompile.convert.evaluate import spread_windows
from mlacompile.convert.form import MLALayer
from mlacompile.convert.latent import Tap, step
from mlacompile.convert.shelf import Shelf
from mlacompile.convert.source import Source, open_source
from mlacompile.convert.stream import Blocks, Layers
from mlacompile.convert.transmla import transmla
from mlacompile.testing.timing import environment

#: Cache saved, and the latent and rotary widths that TransMLA is known with at it. Ours divides the same sum itself.
BUDGETS = {"50 %": Budget(128, 64), "68.75 %": Budget(88, 32), "87.5 %": Budget(16, 32)}
#: TransMLA's own calibration.
BASELINE_WINDOWS, BASELINE_LENGTH = 128, 256
#: As its scripts have it for Llama-3.2-1B, whose heads are as wide. (``freqfold auto`` looks at the test split.)
BASELINE_FOLD = 4


@dataclass(frozen=True)
class Ablation:
    """Ours at half the cache, with one idea switched off."""

    says: str
    recipe: dict[str, Any] = field(default_factory=dict)
    frequencies: Callable[[Source, Budget], list[int]] | None = None
    window: int | None = None
    windows: int | None = None


ABLATIONS = {
    "no refit": Ablation("the output projection stays as it was", {"refit": False}),
    "one balance": Ablation("scores and values weigh what the bound says, in every layer", {"balances": (1.0,)}),
    "attended keys": Ablation("scores are fitted on keys that attention goes to, alone", {"even": 0.0}),
    "even frequencies": Ablation(
        "one rotary lane at every frequency, as TransMLA has it",
        frequencies=lambda source, budget: engine_frequencies(source.model, budget.rope_dim),
    ),
    "short windows": Ablation(
        "windows of 256 tokens, as TransMLA has them, and no keys beyond", {"reach": 0}, window=256
    ),
    "half the text": Ablation("8 windows to fit to", windows=8),
    "no reach": Ablation("no keys put beyond the window", {"reach": 0}),
    "no bias": Ablation("the mean of the values has to come from the latent", {"bias": False}),
}


def second_moments(source: Source, windows: Tensor, form: Sequence[MLALayer] | None = None) -> list[Tensor]:
    """E[x xᵀ] of the input of every attention layer, float64; in the original, or with the attention of ``form``."""
    blocks, layers = Blocks(source), Layers(source)
    stream, moments = blocks.embed(windows), []
    with torch.inference_mode():
        for i, layer in enumerate(layers):
            attention = GroupedAttention(layer) if form is None else LatentAttention(form[i])
            block, tap = blocks[i], Tap(attention)
            total, ahead = torch.zeros(stream.shape[-1], stream.shape[-1], dtype=torch.float64), []
            for part in stream.split(8):
                ahead.append(step(block, part, tap))
                seen = tap.seen.flatten(0, 1)
                total += (seen.T @ seen).double()
            stream = torch.cat(ahead)
            moments.append(total / windows.numel())
    return moments


def ours(
    source: Source, budget: Budget, calibration: Calibration, folder: Path, ablation: Ablation, effort: Effort
) -> tuple[Sequence[MLALayer], dict[str, Any]]:
    if ablation.window is not None:
        cut = ablation.window
        windows = torch.cat((calibration.windows, calibration.validation)).reshape(-1, cut)
        held = calibration.validation.numel() // cut
        calibration = replace(calibration, windows=windows[:-held], validation=windows[-held:])
    if ablation.windows is not None:
        calibration = replace(calibration, windows=calibration.windows[:: len(calibration.windows) // ablation.windows])
    folder.mkdir(parents=True, exist_ok=True)
    frequencies = None if ablation.frequencies is None else ablation.frequencies(source, budget)
    began, worked = time.monotonic(), time.process_time()
    fitted = compress(
        source,
        budget,
        calibration,
        Shelf(folder),
        frequencies=frequencies,
        dtype=torch.bfloat16,
        effort=effort,
        advance=_tell,
        **ablation.recipe,
    )
    took = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - worked}
    row = {"says": ablation.says} | took | {"by_layer": [vars(report) for report in fitted.reports]}
    return fitted.layers, row


def _tell(done: int, total: int) -> None:
    print(f"\r  layer {done} of {total}", end="\n" if done == total else "", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    known = [f"{kind} {name}" for name in BUDGETS for kind in ("baseline", "fast", "ours")] + list(ABLATIONS)
    parser.add_argument("--runs", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    asked = parser.parse_args()

    source = open_source(asked.model)
    calibrations = {name: Calibration.read(source, asked.calibrate, effort) for name, effort in EFFORTS.items()}
    calibration = calibrations["full"]
    texts = [Evaluation.read(source, file) for file in asked.evaluate]
    result: dict[str, Any] = json.loads(asked.result.read_text()) if asked.result.exists() else {"runs": {}}
    result |= {
        "model": source.path.name,
        "environment": environment(),
        "calibration": {
            "text": asked.calibrate.name,
            "fitted": list(calibration.windows.shape),
            "chosen by": list(calibration.validation.shape),
        },
        "evaluation": {text.name: list(text.windows.shape) for text in texts},
    }
    moments: list[Tensor] = []
    cut = torch.empty(0)  # windows of the baseline's calibration
    rows: dict[str, dict[str, Any]] = {}
    forms: list[Sequence[MLALayer]] = []
    for name in asked.runs:
        print(name, flush=True)
        kind, _, rest = name.partition(" ")
        if kind == "baseline":
            if not moments:
                ids = read_ids(source, asked.calibrate, option="--calibrate", at_least=1)
                cut = spread_windows(ids, length=BASELINE_LENGTH, count=BASELINE_WINDOWS)
                moments = second_moments(source, cut)
            layers, rows[name] = baseline(source, BUDGETS[rest], moments, cut)
        else:
            saved = rest if kind in ("ours", "fast") else "50 %"
            budget = Budget.parse(source.model, kv_budget=1 - float(saved.split()[0]) / 100)
            assert budget is not None
            ablation = ABLATIONS.get(name, Ablation("everything on"))
            effort = "fast" if kind == "fast" else "full"
            read = calibrations[effort]
            layers, rows[name] = ours(source, budget, read, asked.work / name, ablation, EFFORTS[effort])
            rows[name]["fitted"] = list(read.windows.shape)
        forms.append(layers)
        rows[name] |= {"rope_dim": layers[0].w_kr.shape[0], "rank": layers[0].w_dkv.shape[0]}
    for text in texts:
        before, *after = evaluate(source, forms, text.windows, dtype=torch.bfloat16, advance=_tell)
        for name, score in zip(rows, after):
            rows[name][text.name] = {
                "original": before.perplexity,
                "perplexity": score.perplexity,
                "kl": score.divergence,
            }
            print(f"{name}, {text.name}: {before.perplexity:.2f} -> {score.perplexity:.2f}", flush=True)
    result["runs"] |= rows
    asked.result.write_text(json.dumps(result, indent=1) + "\n")


def baseline(
    source: Source, budget: Budget, moments: list[Tensor], windows: Tensor
) -> tuple[Sequence[MLALayer], dict[str, Any]]:
    """TransMLA on second moments of ``windows``, the original's being ``moments``."""
    layers, everything = list(Layers(source)), source.model.cache_values - budget.rope_dim
    rotated = [
        transmla(layer, moment, rope_dim=budget.rope_dim, rank=everything, fold=BASELINE_FOLD)
        for layer, moment in zip(layers, moments)
    ]
    partial = second_moments(source, windows, rotated)
    made = [
        transmla(layer, moment, rope_dim=budget.rope_dim, rank=budget.rank, fold=BASELINE_FOLD, partial=after)
        for layer, moment, after in zip(layers, moments, partial)
    ]
    return made, {"fold": BASELINE_FOLD}


if __name__ == "__main__":
    main()
