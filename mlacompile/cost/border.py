"""Where the forms cost the same: the number of queries below which attention on the latent is the cheaper.

Counting FLOPs alone it is a closed formula, solved by SymPy:

    S* = T·R·(N+V) / (T·(2R − N − V) + R·(N+V))      →  R·(N+V) / (2R − N − V)  on a long context

which is 170.67 for R = 512, N = V = 128: the absorbed form pays 2R + P for a pair, the expanded one N + P + V, and
R·(N+V) for each token. With the rates of a device it is where two sums of maxima meet, and found by bisection.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy
from sympy import Expr

from mlacompile.cost import forms
from mlacompile.cost.hardware import Hardware
from mlacompile.cost.predict import predict
from mlacompile.geometry import MLAGeometry

NEVER_EXPAND = 1 << 30


@cache
def flops_border() -> Expr:
    """Queries at which both forms need the same FLOPs, every query seeing every token."""
    every = {forms.PAIRS: forms.S * forms.T}
    difference = forms.flops("absorbed").subs(every) - forms.flops("expanded").subs(every)
    (solution,) = sympy.solve(sympy.expand(difference / (2 * forms.B * forms.H)), forms.S)
    above, below = sympy.fraction(sympy.factor(solution))
    return _with_plus(above) / sympy.collect(sympy.expand(_with_plus(below)), forms.T)


def _with_plus(formula: Expr) -> Expr:
    """The formula or its negative, whichever is positive for a rank that exceeds the widths of heads."""
    sample = {forms.R: 512, forms.N: 128, forms.V: 128, forms.T: 4096}
    return formula if formula.subs(sample) > 0 else -formula


@cache
def long_context_border() -> Expr:
    """The same for a context much longer than the number of queries."""
    above, below = sympy.fraction(sympy.factor(sympy.limit(flops_border(), forms.T, sympy.oo)))
    return _with_plus(above) / _with_plus(below)


def flops_border_of(geometry: MLAGeometry, context: int | None = None) -> float:
    """The number for one geometry; None: on a long context. Infinite where absorbing never costs more."""
    g = geometry
    values = {forms.R: g.rank, forms.N: g.nope, forms.P: g.rope, forms.V: g.v}
    if context is None and 2 * g.rank <= g.nope + g.v:
        return float("inf")
    formula = long_context_border() if context is None else flops_border().subs(forms.T, context)
    found = float(formula.subs(values))
    return found if found > 0 else float("inf")


@cache
def border(
    geometry: MLAGeometry,
    batch: int,
    context: int,
    dtype: str,
    hardware: Hardware,
    expanded: str = "expanded",
    masked: bool = False,
    opaque: bool = False,
) -> int:
    """The largest number of queries, the last of ``context`` tokens, that is predicted to be cheaper absorbed.

    0: never; ``NEVER_EXPAND``: always. expanded: which expanded form it is compared with. masked, opaque: the expanded
    and the absorbed form compute every pair, under a mask in memory.
    """

    def absorbed_wins(queries: int) -> bool:
        sizes: dict[str, Any] = {"batch": batch, "queries": queries, "context": context, "dtype": dtype}
        one = predict("absorbed", geometry, hardware=hardware, masked=opaque, **sizes)
        other = predict(expanded, geometry, hardware=hardware, masked=masked, **sizes)
        return one.seconds <= other.seconds

    low, high = 1, context
    if absorbed_wins(high):
        return NEVER_EXPAND
    if not absorbed_wins(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if absorbed_wins(middle) else (low, middle)
    return low
