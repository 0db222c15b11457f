"""What weights of the softmax in e4m3 cost, and how often what they count from moves: a simulation, on the CPU.

    python benchmarks/fp8_weights.py                               the rule of the kernel, its parts, another
    python benchmarks/fp8_weights.py --out results/fp8_weights-cpu.json

A row of scores is taken block by block, as ``hopper_turned_by_turns.py`` takes it, the last block first: weights of a
block are e4m3 values, counted from a power of two that follows the largest score so far by some rule. Scores are
random, of some standard deviation; or near each other, behind a first token with 2^n times the weight of any other,
whose own values are zero, as those of such tokens nearly are. Values have nothing to do with scores: where they have,
errors are smaller.
``moved``: of all blocks but the first, in how many a row moves, any of eight rows, any of 64.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlacompile.testing.timing import environment

TOKENS, BLOCK, ROWS, COLUMNS = 8192, 64, 64, 32
TOP = 8  # P is 2^TOP at most, by other rules than the kernel's
REPEATS = 4
LOG2_E = 1.4427
DEVIATIONS = (1.73, 4.3, 6.9)
FIRST_TOKENS = (8, 10, 12, 14)
FALL = 12.0
NARROW = 0.3 * LOG2_E  # standard deviation of scores behind a first token


@dataclass(frozen=True)
class Rule:
    """What exponents count from moves when a block's largest exceeds it by 2^slack, and leaves 2^spare more then.

    top: P is 2^top at most. falls: by 2^FALL at most, to a block that is as far below the top. last_first: the last
    block is taken first.
    """

    slack: float
    spare: float = 0.0
    top: float = TOP
    falls: bool = False
    last_first: bool = False

    @classmethod
    def of_kernel(cls) -> Rule:
        """The rule as it is."""
        from mlacompile.kernels.mla_decode import hopper_turned_by_turns as kernel

        slack, spare, room = (getattr(kernel, name).value for name in ("SLACK", "SPARE", "FP8_ROOM"))
        return cls(slack, spare, room + slack, last_first=True)

    def next(self, before: Tensor | None, highest: Tensor) -> Tensor:
        """What a block counts from. before: what the block before did. All of them [rows]."""
        if before is None:
            return highest + self.spare
        m = torch.where(highest > before + self.slack, highest + self.spare, before)
        if self.falls:
            m = torch.where(highest < before + self.slack - FALL, torch.maximum(highest, before - FALL), m)
        return m


def simulate(scores: Tensor, values: Tensor, rule: Rule) -> tuple[float, list[float]]:
    """The error of the output, by its norm, over rows; and shares of blocks in which rows, eights and tiles move.

    scores: [ROWS, tokens], base 2. values: [tokens, columns].
    """
    largest = scores.amax(1)
    total = torch.zeros(ROWS, values.shape[1], dtype=torch.float64)
    moved = torch.zeros(3, dtype=torch.float64)
    m: Tensor | None = None
    blocks = list(zip(scores.split(BLOCK, 1), values.split(BLOCK), strict=True))
    for s, v in reversed(blocks) if rule.last_first else blocks:
        before, m = m, rule.next(m, s.amax(1))
        if before is not None:
            some = m != before
            moved += torch.stack([x.double().mean() for x in (some, some.view(-1, 8).any(1), some.any())])
        unit = m + rule.slack - rule.top
        p = torch.exp2(s - unit[:, None]).clamp(max=448).to(torch.float8_e4m3fn).double()
        total += (p @ v.double()) * torch.exp2((unit - largest).double())[:, None]
    want = torch.exp2((scores - largest[:, None]).double()) @ values.double()
    error = ((total - want).norm(dim=1) / want.norm(dim=1)).square().mean().sqrt()
    return float(error), (moved / (len(blocks) - 1)).tolist()


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Scores and values, by what is special about them."""
    values = torch.randn(TOKENS, COLUMNS)
    found = {f"deviation {x}": (torch.randn(ROWS, TOKENS) * x * LOG2_E, values) for x in DEVIATIONS}
    behind = values.clone()
    behind[0] = 0
    for power in FIRST_TOKENS:
        scores = torch.randn(ROWS, TOKENS) * NARROW
        scores[:, 0] = power
        found[f"first token 2^{power}"] = scores, behind
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--commit", help="what is simulated, where the tree has no git of its own")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rule = Rule.of_kernel()
    rules = {
        "up and down": Rule(6.0, falls=True),
        "up only": Rule(rule.slack, top=rule.top),
        "and spare": replace(rule, last_first=False),
        "as it is": rule,
    }
    data = [cases() for _ in range(REPEATS)]
    records: list[dict[str, Any]] = []
    for name, how in rules.items():
        print(f"{name}: {how}")
        for case in data[0]:
            results = [simulate(*some[case], how) for some in data]
            error = sum(e for e, _ in results) / REPEATS
            moved = [sum(shares) / REPEATS for shares in zip(*(shares for _, shares in results), strict=True)]
            records.append({"rule": name, **asdict(how), "case": case, "error": error, "moved": moved})
            print(f"    {case:20s} error {error:8.1e}   moved {' '.join(f'{x:6.1%}' for x in moved)}", flush=True)
    if arguments.out:
        info = environment() | ({"commit": arguments.commit} if arguments.commit else {})
        arguments.out.write_text(json.dumps({"environment": info, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
