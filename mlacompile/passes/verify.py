"""``verify="first-call"``: the original graph beside the compiled one, once, on the real inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from mlacompile.errors import VerificationError
from mlacompile.options import Options

Compiled = Callable[..., Any]

#: Rounding steps between the input and the output of a graph that may add up, seen as a random walk: the square root
#: of the
#: number of rounded values an output passes through, of which 2**14 is more than any model of this kind has.
_ROUNDINGS = 2.0**7


def verified_once(compiled: Compiled, original: GraphModule, options: Options) -> Compiled:
    """``compiled``, checked against ``original`` on its first call when the options ask for it.

    Raises (on that call):
        VerificationError: an output, or an input written in place, differs by more than rounding in its dtype explains.
    """
    if options.verify != "first-call":
        return compiled
    pending = [True]

    def checked(*args: Any) -> Any:
        if not pending:
            return compiled(*args)
        copies = copy.deepcopy(args)  # inputs that share memory still do
        pending.clear()
        with torch.no_grad():
            want = tree_leaves(original(*copies))
        got = compiled(*args)
        _compare("output", tree_leaves(got), want)
        _compare("input", args, copies)  # caches are written in place
        return got

    return checked


def _compare(what: str, got: Sequence[Any], want: Sequence[Any]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        finite = torch.isfinite(b)
        size = b[finite].abs().max() if bool(finite.any()) else torch.ones(())
        error = (a - b)[finite].abs().max() if bool(finite.any()) else torch.zeros(())
        allowed = _ROUNDINGS * torch.finfo(b.dtype).eps * float(size)
        if not float(error) <= allowed:
            raise VerificationError(
                f"{what} {i} of the compiled graph differs from the original by {float(error):.3e}; rounding in "
                f"{b.dtype} explains {allowed:.3e}. This is a bug in mlacompile: please report it with the dump folder"
            )
