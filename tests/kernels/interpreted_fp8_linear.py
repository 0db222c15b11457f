"""Runs cases through the Triton kernels of ``fp8_linear`` in Triton's interpreter; a process of its own, as the mode is
set at import.

Usage: python interpreted_fp8_linear.py CASES, a Python list of (arguments of make_product, arguments of Tiles). Prints
one line a failure.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from mlacompile.kernels import parts
from mlacompile.kernels.fp8_linear import launch
from mlacompile.kernels.fp8_linear.launch import Tiles, fp8_linear_tiles
from mlacompile.kernels.fp8_linear.supports import tiles_reasons
from mlacompile.testing.scaled import exact, make_product, worst
from tests.kernels.spoilt import spoil

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy(tensor: object, scope: interpreter._LangPatchScope) -> None:
    """The interpreter turns arrays of one element into loop bounds with int(), which NumPy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_for_numpy
parts._drop = spoil
launch.in_whole_lines = lambda t: t.stride(0) * t.itemsize % 128 == 0


def parts_are_dropped() -> None:
    """When all of them are read, in programs of their own, and nothing behind them."""
    around = torch.randn(4, 40, 112)
    before, parts = around.clone(), around[:3]
    out = torch.empty(40, 112)
    launch.sum_launch(parts, out)()
    if not torch.allclose(out, before[:3].sum(0), atol=1e-5):
        print("parts were dropped before they were added")
    if not parts.isnan().all() or not torch.equal(around[3], before[3]):
        print(
            f"{int(around[:3].isnan().sum())} of {parts.numel()} values dropped, {int(around[3].isnan().sum())} beside"
        )


if __name__ == "__main__":
    parts_are_dropped()
    torch.set_num_threads(1)
    for case, chosen in eval(sys.argv[1], {"torch": torch}):
        product = make_product(**case)
        if reasons := tiles_reasons(*product.tensors, torch.float32):
            print(f"{case}: unsupported: {reasons}")
            continue
        got = fp8_linear_tiles(*product.tensors, torch.float32, Tiles(**chosen))
        if wrong := worst(got, *exact(product, torch.float32)):
            print(f"{case} {chosen}: {wrong}")
