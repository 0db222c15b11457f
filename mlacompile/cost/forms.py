"""The forms of latent attention as lists of steps, each with its FLOPs and bytes as SymPy expressions.

    absorbed    q·w_uk │ attention over the latent │ ·w_uv                          per query: R·(N+V) more
    expanded    latent·[w_uk, w_uv] │ assemble keys │ attention over heads          per token: R·(N+V) more
    chunked     the same a chunk at a time: keys are written in place, partial results merged by log-sum-exp

A step is one product or one pass over memory, which a roofline bounds by max(FLOPs / rate, bytes / bandwidth). The
queries are the last S of T tokens, and causal: a query does not see those after it.

Attention on heads works on tiles of queries of one head and goes through all tokens for each: a tile that is not full
costs as much as a full one, and fewer tiles than the device has units leave the others idle. Attention on the latent is
free of both, as all heads' queries share a tile and the tokens are split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import sympy
from sympy import Expr, Integer, Rational, Symbol, ceiling

#: batch, query tokens, cached tokens (new ones included), heads, rank, nope, rope, v
B, S, T, H, R, N, P, V = (Symbol(name, positive=True) for name in ["B", "S", "T", "H", "R", "N", "P", "V"])
#: bytes of a weight, of a cached value, of an activation; tokens expanded at a time, queries of a tile
w, c, x, C, Q = (Symbol(name, positive=True) for name in ["w", "c", "x", "C", "Q"])

SYMBOLS = (B, S, T, H, R, N, P, V, w, c, x, C, Q)

#: (query, token) pairs of one head when the queries are the last S of T tokens
PAIRS: Expr = S * (T - (S - 1) * Rational(1, 2))

FORMS = ("absorbed", "expanded", "chunked")


_ONE, _NONE = Integer(1), Integer(0)


@dataclass(frozen=True)
class Step:
    """One product or pass over memory.

    kind: whose rate bounds it: "matmul", "expand" (a product written straight into place), "latent" (attention over the
    latent), "heads" (attention over heads), "masked" (the same under a materialised mask), "copy", "scatter" (a copy
    into rows that lie apart). launches: kernels it takes. tiles: of queries that it works on one by one, 0 where the
    work is split as evenly as one likes.
    """

    name: str
    kind: str
    flops: Expr
    bytes: Expr
    launches: Expr = _ONE
    tiles: Expr = _NONE


@cache
def steps(form: str, *, masked: bool = False) -> tuple[Step, ...]:
    """The steps of a form. masked: every pair is computed, under a mask in memory.

    Raises:
        KeyError: for a form that is not one of ``FORMS``.
    """
    return {"absorbed": _absorbed, "expanded": _expanded, "chunked": _chunked}[form](masked)


def _absorbed(masked: bool) -> tuple[Step, ...]:
    rows, pairs = B * S * H, S * T if masked else PAIRS
    return (
        Step("q_nope · w_uk", "matmul", 2 * rows * N * R, w * H * N * R + x * rows * (N + R)),
        Step(
            "attention on the latent",
            "latent",
            2 * B * H * pairs * (2 * R + P),
            c * B * T * (R + P) + x * rows * (2 * R + P),
            Integer(2),  # the splits of a long context are combined by a second kernel
        ),
        Step("o_latent · w_uv", "matmul", 2 * rows * R * V, w * H * R * V + x * rows * (R + V)),
    )


_TILES: Expr = B * H * ceiling(S / Q)


def _expand(kind: str, launches: Expr) -> Step:
    moved = c * B * T * R + w * H * R * (N + V) + x * B * T * H * (N + V)
    return Step("c_kv · [w_uk, w_uv]", kind, 2 * B * T * R * H * (N + V), moved, launches)


def _expanded(masked: bool) -> tuple[Step, ...]:
    keys, values, rows = B * T * H * (N + P), B * T * H * V, B * S * H
    kind, pairs = ("masked", S * T) if masked else ("heads", PAIRS)
    mask: Expr = B * S * T if masked else Integer(0)
    return (
        _expand("matmul", _ONE),
        Step("assemble keys", "copy", Integer(0), x * (B * T * H * N + keys) + c * B * T * P, Integer(2)),
        Step(
            "attention on heads",
            kind,
            2 * B * H * pairs * (N + P + V),
            x * (keys + values + rows * (N + P + V)) + mask,
            tiles=_TILES,
        ),
    )


def _chunked(masked: bool) -> tuple[Step, ...]:
    keys, values, rows = B * T * H * (N + P), B * T * H * V, B * S * H
    kind, pairs = ("masked", S * T) if masked else ("heads", PAIRS)
    chunks = ceiling(T / C)
    partial = chunks * rows * (x * (N + P + V) + 4)
    return (
        _expand("expand", 2 * chunks),  # keys and values apart, each straight into place
        Step("rotary keys", "scatter", Integer(0), c * B * T * P + x * B * T * H * P, chunks),
        Step(
            "attention on heads",
            kind,
            2 * B * H * pairs * (N + P + V),
            x * (keys + values) + partial,
            chunks,
            _TILES,
        ),
        # float32 accumulators are read and written, the chunk's output read, once for each chunk after the first
        Step("merge chunks", "copy", Integer(0), (chunks - 1) * rows * V * (8 + x), 3 * (chunks - 1)),
    )


def flops(form: str) -> Expr:
    """All FLOPs of a form."""
    return sympy.Add(*(step.flops for step in steps(form)))
