"""Thousands of random spellings and near misses, one seed each: ``python -m tests.many_spellings --modules 2000``.

The tests run a few of them with hypothesis; this is the long run. Every failure prints its seed, and ``--seed N
--modules 1`` runs it again.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sys
import time

import torch

from mlacompile import backend, last_report
from tests.spellings import NEAR, Attention, Spelling, compose, compose_near_miss

BATCH, CONTEXT = 2, 9
#: float32 rounding of sums of at most rank + context terms, twice, relative to the largest output; float64 likewise.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
SINK_IN_FLOAT64 = 1e-6  # the log-sum-exp that a sink is weighed against is float32


def make_mask(spelling: Spelling, batch: int, queries: int, context: int) -> torch.Tensor | None:
    """The mask a spelling is called with, ``[B, 1, S, T]``: causal, and left padding in the first sentence."""
    if spelling.mask in ("none", "causal", "computed"):
        return None
    allowed = torch.ones(queries, context).tril(context - queries).bool().expand(batch, 1, -1, -1).clone()
    allowed[0, :, :, :3] = allowed.shape[2] == context
    if spelling.mask == "bool":
        return allowed
    return torch.zeros(allowed.shape, dtype=spelling.dtype).masked_fill(~allowed, float("-inf"))


def compiled_and_eager(
    spelling: Spelling, queries: int = 1, batch: int = BATCH, context: int = CONTEXT, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the compiled and of the plain module on the same input, weights and cache."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    module = Attention(spelling, batch, context).eval()
    for buffer in module.buffers():
        buffer.normal_()
    tokens = queries if spelling.cache != "none" else context
    x = torch.randn(batch, tokens, spelling.hidden, dtype=spelling.dtype)
    position = context - tokens
    mask = make_mask(spelling, batch, tokens, context)
    twin = copy.deepcopy(module)
    options = {"rest": "eager", "form": "absorbed"}  # which form is cheaper is another question
    with torch.no_grad():
        want = twin(x, position, mask)
        got = torch.compile(module, backend=backend, options=options)(x, position, mask)
    for (name, a), (_, b) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(a, b), f"cache {name} differs"
    return got, want


def fault_of(spelling: Spelling, queries: int = 1, seed: int = 0) -> str | None:
    """What is wrong with how a spelling was compiled, or None."""
    got, want = compiled_and_eager(spelling, queries, seed=seed)
    error = float((got - want).abs().max() / want.abs().max())
    report = last_report()
    reasons = [s.reason for s in report.sites]
    tolerance = max(TOLERANCE[spelling.dtype], SINK_IN_FLOAT64 if spelling.sink else 0.0)
    if not error <= tolerance:
        return f"differs by {error:.1e}; {reasons}"
    if not spelling.near:
        return None if report.absorbed == 1 else f"not absorbed: {reasons}"
    if report.absorbed or report.refused != 1:
        return f"{report.absorbed} absorbed, {report.refused} refused: {reasons}"
    return None if re.search(NEAR[spelling.near], reasons[0]) else f"refused for another reason: {reasons[0]}"


def main() -> int:
    """Run, and return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=2000)
    parser.add_argument("--misses", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="seeds run from here")
    settings = parser.parse_args()
    failed = 0
    for kind, count, make in (
        ("absorbed", settings.modules, compose),
        ("refused", settings.misses, compose_near_miss),
    ):
        begin, bad = time.perf_counter(), 0
        for seed in range(settings.seed, settings.seed + count):
            rng = random.Random(seed)
            spelling = make(rng.choice)
            try:
                fault = fault_of(spelling, rng.choice((1, 1, 2, 3)), seed)
            except Exception as error:
                fault = f"{type(error).__name__}: {str(error)[:300]}"
            if fault is not None:
                bad += 1
                print(f"seed {seed}: {spelling}\n    {fault}", flush=True)
            done = seed + 1 - settings.seed
            if done % 100 == 0:
                print(f"  {done - bad} of {done} so far", flush=True)
        spent = time.perf_counter() - begin
        if count:
            last = settings.seed + count - 1
            print(f"{count - bad} of {count} {kind} as expected (seeds {settings.seed} to {last}, {spent:.0f} s)")
        failed += bad
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 255))
