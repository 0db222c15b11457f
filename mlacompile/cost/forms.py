"""The forms of latent attention as lists of steps, each with its FLOPs and bytes as SymPy expressions.

    absorbed    q·w_uk │ attention over the latent │ ·w_uv                          per query: R·(N+V) more
    expanded    latent·[w_uk, w_uv] │ assemble keys │ attention over heads          per token: R·(N+V) more
    chunked     the same a chunk at a time: keys are written in place, partial results merged by log-sum-exp

A step is one product or one pass over memory, which a roofline bounds by max(FLOPs / rate, bytes / bandwidth). The
queries are the last S of T tokens, and causal: a query does not see those after it.

Attention on heads works on tiles of queries of one head and goes through all tokens for each: a tile that is not full
costs as much as a full one, and fewer tiles than the device has units leave the others idle. In attention on the latent
the queries of all heads share tiles, which the units take in turns; where those are few the tokens are split, and the
parts, in float32, are written and read again to merge them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import sympy
from sympy import Expr, Integer, Max, Min, Rational, Symbol, ceiling, floor

#: batch, query tokens, cached tokens (new ones included), heads, rank, nope, rope, v
B, S, T, H, R, N, P, V = (Symbol(name, positive=True) for name in ["B", "S", "T", "H", "R", "N", "P", "V"])
#: bytes of a weight, of a cached value, of an activation; tokens expanded at a time, queries of a tile, units
w, c, x, C, Q, U = (Symbol(name, positive=True) for name in ["w", "c", "x", "C", "Q", "U"])

SYMBOLS = (B, S, T, H, R, N, P, V, w, c, x, C, Q, U)

#: (query, token) pairs of one head when the queries are the last S of T tokens
PAIRS: Expr = S * (T - (S - 1) * Rational(1, 2))

FORMS = ("absorbed", "expanded", "chunked")


_ONE = Integer(1)


@dataclass(frozen=True)
class Step:
    """One product or pass over memory.

    kind: whose rate bounds it: "matmul", "expand" (a product written straight into place), "latent" (attention over the
    latent), "heads" (attention over heads), "masked" (the same under a materialised mask), "copy", "scatter" (a copy
    into rows that lie apart). launches: kernels it takes. waste: how much longer it takes than its FLOPs, for rows of
    tiles that are not there and for idle units.
    """

    name: str
    kind: str
    flops: Expr
    bytes: Expr
    launches: Expr = _ONE
    waste: Expr = _ONE


@cache
def steps(form: str, *, masked: bool = False) -> tuple[Step, ...]:
    """The steps of a form. masked: every pair is computed, under a mask in memory.

    Raises:
        KeyError: for a form that is not one of ``FORMS``.
    """
    return {"absorbed": _absorbed, "expanded": _expanded, "chunked": _chunked}[form](masked)


#: Tiles of rows (a head of a query) on the latent, and the pieces the tokens are cut into for each: a tile at least.
_ROWS = 64
_LATENT_TILES: Expr = ceiling(B * S * H / _ROWS)
_PIECES: Expr = Max(1, Min(floor(U / _LATENT_TILES), ceiling(T / _ROWS)))
_PARTS: Expr = _LATENT_TILES * _PIECES


def _absorbed(masked: bool) -> tuple[Step, ...]:
    rows = B * S * H  # the same with and without a mask: the kernels go through all tokens for every query
    return (
        Step("q_nope · w_uk", "matmul", 2 * rows * N * R, w * H * N * R + x * rows * (N + R)),
        Step(
            "attention on the latent",
            "latent",
            2 * B * H * S * T * (2 * R + P),
            c * B * T * (R + P) + x * rows * (2 * R + P),
            waste=ceiling(_PARTS / U) * U / _PARTS,
        ),
        Step("merge parts", "copy", Integer(0), 8 * rows * R * _PIECES * Min(1, _PIECES - 1)),
        Step("o_latent · w_uv", "matmul", 2 * rows * R * V, w * H * R * V + x * rows * (R + V)),
    )


_TILES: Expr = B * H * ceiling(S / Q)
_WASTE: Expr = _TILES * Q / (B * S * H) * Max(1, U / _TILES)


def _expand(kind: str, tokens: Expr, launches: Expr) -> Step:
    moved = c * B * tokens * R + w * H * R * (N + V) + x * B * tokens * H * (N + V)
    return Step("c_kv · [w_uk, w_uv]", kind, 2 * B * tokens * R * H * (N + V), moved, launches)


def _expanded(masked: bool) -> tuple[Step, ...]:
    keys, values, rows = B * T * H * (N + P), B * T * H * V, B * S * H
    kind, pairs = ("masked", S * T) if masked else ("heads", PAIRS)
    mask: Expr = B * S * T if masked else Integer(0)
    return (
        _expand("matmul", T, _ONE),
        Step("assemble keys", "copy", Integer(0), x * (B * T * H * N + keys) + c * B * T * P, Integer(2)),
        Step(
            "attention on heads",
            kind,
            2 * B * H * pairs * (N + P + V),
            x * (keys + values + rows * (N + P + V)) + mask,
            waste=_WASTE,
        ),
    )


#: Queries are taken in blocks of a chunk. Each looks at all chunks before it, then at itself: so many spans of tokens,
#: and so many tokens expanded, in all.
_BLOCKS: Expr = ceiling(S / C)
_EARLIER: Expr = _BLOCKS * (_BLOCKS - 1) / 2
_SPANS: Expr = _BLOCKS * (ceiling((T - S) / C) + 1) + _EARLIER
_SEEN: Expr = _BLOCKS * (T - S) + S + C * _EARLIER


def _chunked(masked: bool) -> tuple[Step, ...]:
    spans, seen = (_BLOCKS * ceiling(T / C), _BLOCKS * T) if masked else (_SPANS, _SEEN)
    keys, values, rows = B * seen * H * (N + P), B * seen * H * V, B * S * H
    kind, pairs = ("masked", S * T) if masked else ("heads", PAIRS)
    merges = spans / _BLOCKS - 1  # of each block
    any_merge = Min(1, merges)
    partial = spans / _BLOCKS * rows * (x * (N + P + V) + 4)
    return (
        _expand("expand", seen, 2 * spans),  # keys and values apart, each straight into place
        Step("rotary keys", "scatter", Integer(0), c * B * seen * P + x * B * seen * H * P, spans),
        Step(
            "attention on heads",
            kind,
            2 * B * H * pairs * (N + P + V),
            x * (keys + values) + partial,
            spans,
            _WASTE,
        ),
        # A span is widened to float32 and joined to the sum; so is the first one, and at last the sum is narrowed.
        Step(
            "merge spans",
            "copy",
            Integer(0),
            rows * V * (merges * (16 + x) + any_merge * (8 + 2 * x)),
            _BLOCKS * (6 * merges + 2 * any_merge),
        ),
    )


def flops(form: str) -> Expr:
    """All FLOPs of a form."""
    return sympy.Add(*(step.flops for step in steps(form)))
