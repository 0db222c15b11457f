"""The cheapest order of the products before and after attention on the latent.

    before   c_q · W_UQ · W_UK     hidden or q-rank → nope → rank       a head each
    after    o_latent · W_UV · W_O      rank → v → hidden                a head each, summed over heads

A chain is a list of widths; data enters on the left with some rows, weights stand to the right. Multiplying two
weights with
each other first (*merging* them) is free at run time when it is done once a weight version, so its cost is what the
merged
weight costs: rows·a·c FLOPs instead of rows·(a·b + b·c), and as many bytes read instead. This is the classical
chain of
matrices (Godbole 1973) with products of weights alone at price zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from mlacompile.cost.hardware import Hardware


@dataclass(frozen=True)
class Order:
    """How a chain is cut into products with the data. cuts: the widths data passes through, first and last included.

    merged: whether any two weights are multiplied with each other beforehand.
    """

    cuts: tuple[int, ...]
    seconds: float
    flops: int
    weight_bytes: int
    merged: bool


def best_order(
    widths: tuple[int, ...],
    *,
    rows: int,
    itemsize: int,
    dtype: str,
    hardware: Hardware,
    heads: int = 1,
    allow_merge: bool = True,
) -> Order:
    """The cheapest way to multiply ``rows`` rows of width ``widths[0]`` through to ``widths[-1]``.

    Args:
        widths: of the data and of what each weight turns it into; at least two.
        heads: the chain exists this often, with weights of its own. allow_merge: False: one weight after the other.
    Raises:
        ValueError: fewer than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"a chain of {len(widths)} widths; at least two were expected")

    @cache
    def cheapest_from(start: int) -> tuple[float, tuple[int, ...]]:
        if start == len(widths) - 1:
            return 0.0, (start,)
        options = []
        for end in range(start + 1, len(widths) if allow_merge else start + 2):
            rest, cuts = cheapest_from(end)
            options.append((_seconds(widths[start], widths[end]) + rest, (start, *cuts)))
        return min(options)

    def _seconds(a: int, b: int) -> float:
        flops = 2 * rows * heads * a * b
        moved = itemsize * heads * (a * b + rows * (a + b))
        return max(flops / hardware.rate("matmul", dtype), moved / hardware.bandwidth) + hardware.latency

    seconds, cuts = cheapest_from(0)
    pairs = list(pairwise(cuts))
    return Order(
        tuple(widths[i] for i in cuts),
        seconds,
        sum(2 * rows * heads * widths[a] * widths[b] for a, b in pairs),
        sum(itemsize * heads * widths[a] * widths[b] for a, b in pairs),
        merged=len(pairs) < len(widths) - 1,
    )


def merges_below(inner: int, last: int) -> float:
    """The first width of a chain of three below which its two weights, merged, are the smaller: fewer FLOPs for any
    number of rows, and fewer bytes.

        first · last < first · inner + inner · last      ⇔      first < inner · last / (last − inner)
    """
    return inner * last / (last - inner) if last > inner else float("inf")
