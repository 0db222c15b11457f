"""Runs cases through the portable kernel in Triton's interpreter; a process of its own, as the mode is set at import.

Usage: python interpreted.py CASES, a Python list of (LatentCase arguments, Plan arguments); the former may hold a
``page`` and ``fp8``, arguments of ``quantized``, besides. Prints one line a failure.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from mlacompile.kernels.mla_decode.launch import mla_decode_portable
from mlacompile.kernels.mla_decode.plan import Plan
from mlacompile.kernels.mla_decode.supports import portable_reasons
from mlacompile.testing.latents import LatentCase, exact, make_inputs, paged, quantized, worst

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy(tensor: object, scope: interpreter._LangPatchScope) -> None:
    """The interpreter turns arrays of one element into loop bounds with int(), which NumPy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_for_numpy


def failure(case: LatentCase, plan: Plan, page: int = 0, fp8: dict[str, Any] | None = None) -> str:
    given = inputs = make_inputs(case)
    if fp8 is not None:
        given, inputs = quantized(inputs, **fp8)
    given = paged(given, page) if page else given
    if reasons := portable_reasons(*given.tensors, **given.keywords):  # type: ignore[arg-type]
        return f"{case} {plan}: unsupported: {reasons}"
    out, lse = mla_decode_portable(*given.tensors, **given.keywords, plan=plan)  # type: ignore[arg-type]
    want = exact(inputs, unit=2**-23)
    wrong = worst(out, want.out, want.out_bound) or worst(
        lse, want.lse, want.lse_bound + 2**-23 * want.lse.abs().nan_to_num(posinf=0.0)
    )
    return f"{case} {plan}: {wrong}" if wrong else ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case, plan in eval(sys.argv[1], {"torch": torch}):
        others = {name: case.pop(name) for name in ("page", "fp8") if name in case}
        if wrong := failure(LatentCase(**case), Plan(**plan), **others):
            print(wrong)
