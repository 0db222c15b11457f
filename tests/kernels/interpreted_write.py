"""Runs ``write_latents`` in Triton's interpreter; a process of its own. One line a failure."""

from __future__ import annotations

from typing import Any

import interpreted  # noqa: F401  (sets the mode)
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mlacompile.kernels.write_latents.launch import write_latents_triton
from mlacompile.kernels.write_latents.supports import triton_reasons
from mlacompile.ops import write_latents_reference
from mlacompile.testing.written import CACHES, WriteCase, differences, make_write

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_convert = InterpreterBuilder.create_fp_to_fp


def _convert_to_fp8(self: Any, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
    """The interpreter's own cast rounds ties away from even, denormals down, and knows no NaN."""
    wanted = _FP8.get(dst_type.scalar)
    if wanted is None:
        return _convert(self, src, dst_type, rounding)
    values = torch.from_numpy(src.data.copy()).to(wanted)
    return TensorHandle(values.view(torch.uint8).numpy(), dst_type.scalar)


InterpreterBuilder.create_fp_to_fp = _convert_to_fp8


def main() -> None:
    shapes = [(1, 1, 512, 64, 20), (2, 3, 200, 24, 3), (3, 1, 65, 6, 1), (1, 2, 128, 2, 17)]
    for kind in CACHES:
        for i, (b, s, r, p, h) in enumerate(shapes):
            for pairs in ("interleaved", "halves", "interleaved to halves", "") if i == 1 else ("interleaved",):
                case = WriteCase(b, s, r, p, h, kind=kind, pairs=pairs, norm=i != 2, seed=i)
                got, want = make_write(case), make_write(case)
                if reasons := triton_reasons(*got.arguments, **got.settings):
                    print(f"{case}: unsupported: {reasons}")
                    continue
                q = write_latents_triton(*got.arguments, **got.settings)
                exact = write_latents_reference(*want.arguments, **want.settings)
                if wrong := differences(got, q, want, exact):
                    print(f"{case}: {wrong}")


def not_finite() -> None:
    """Infinities, NaN, zeros and denormals, quantized: as the reference says, byte for byte."""
    for kind in ("block", "token"):
        for value in (torch.inf, -torch.inf, torch.nan, 0.0, 1e-42):
            case = WriteCase(1, 1, 256, 8, 0, kind=kind, pairs="", norm=False)
            got, want = make_write(case), make_write(case)
            for made in (got, want):
                latent = made.arguments[0]
                latent[..., :128] = 0.0 if abs(value) < 1 else latent[..., :128]
                latent[0, 0, 3] = value
            write_latents_triton(*got.arguments, **got.settings)
            write_latents_reference(*want.arguments, **want.settings)
            if wrong := differences(got, None, want, None):
                print(f"{kind} {value}: {wrong}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    not_finite()
