"""GPU kernels once on small ragged shapes, for compute-sanitizer: every one of ``mla_decode``, and those FP8 products
whose programs share their work.

    compute-sanitizer --tool racecheck python -m tests.kernels.small_shapes

Nothing is compared here; ``test_gpu.py`` does that.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mlacompile.ops import mla_decode
from mlacompile.ops.absorb_and_write import absorb_and_write
from mlacompile.ops.fp8_linear import fp8_linear
from mlacompile.ops.fp8_stacked import fp8_stacked
from mlacompile.ops.heads_quantized import heads_quantized
from mlacompile.ops.quantize_rows import quantize_rows
from mlacompile.testing.absorbed import AbsorbCase, make_absorbed
from mlacompile.testing.heads import make_heads
from mlacompile.testing.latents import LatentCase, in_one_run, make_inputs, paged, quantized
from mlacompile.testing.quantized_rows import FORMS, make_rows
from mlacompile.testing.scaled import make_product

CASE = LatentCase(
    batch=2, heads=20, tokens=152, rank=512, rope=64, dtype=torch.bfloat16, start=True, length=True, poison=True
)


def main() -> None:
    impls = ["triton"] + ["gluon"] * (torch.cuda.get_device_capability()[0] == 9)
    plain = make_inputs(CASE, device="cuda")
    per_token, _ = quantized(make_inputs(CASE, device="cuda"), per="token")
    per_block, _ = quantized(make_inputs(CASE, device="cuda"), per="block")
    forty, _ = quantized(make_inputs(replace(CASE, heads=40), device="cuda"), per="token")
    in_place, _ = quantized(make_inputs(CASE, device="cuda"), per="token", dtype=torch.float8_e5m2)
    calls = [
        plain,
        paged(plain, 64),
        per_token,
        paged(per_token, 64),
        forty,
        in_place,
        in_one_run(paged(per_block, 64)),
    ]
    for inputs in calls:
        for impl in impls:
            mla_decode(*inputs.tensors, **inputs.keywords, impl=impl)
            torch.cuda.synchronize()
            print(impl, "ran", flush=True)
    if "gluon" in impls:  # which is chosen for longer rows only
        from mlacompile.kernels.mla_decode.hopper_launch import mla_decode_hopper
        from mlacompile.kernels.mla_decode.plan import HopperPlan

        several, _ = quantized(make_inputs(replace(CASE, heads=40), device="cuda"), per="block")
        wide = [(paged(forty, 64), False), (paged(forty, 64), True), (in_one_run(paged(several, 64)), True)]
        for inputs, apart in wide:
            plan = HopperPlan(2, turned=True, apart=apart)
            mla_decode_hopper(*inputs.tensors, **inputs.keywords, plan=plan)  # type: ignore[arg-type]
            torch.cuda.synchronize()
            print("FP8 products of 40 rows in one tile ran", flush=True)
        for m in (50, 100):
            both = [make_product(m, n, 784, quantized=True, device="cuda") for n in (1280, 200)]
            weights, descales = [p.weight for p in both], [p.weight_descale for p in both]
            fp8_stacked(both[0].x, both[0].x_descale, weights, descales, torch.bfloat16, impl="stream")
            torch.cuda.synchronize()
            print("two FP8 weights ran", flush=True)
    for form in FORMS:
        rows = make_rows(3, 640, form, device="cuda")
        quantize_rows(*rows.tensors, **rows.settings)
        quantize_rows(*rows.tensors, torch.zeros(7, 64, device="cuda"), **rows.settings, spent=True)
        torch.cuda.synchronize()
        print("rows quantized,", form, "ran", flush=True)
    for kind in ("token", "block"):
        made = make_absorbed(AbsorbCase(3, 5, 208, 192, 24, kind=kind, device="cuda"))
        for impl in ["auto"] + ["heads"] * ("gluon" in impls):
            absorb_and_write(*made.arguments, **made.settings, impl=impl)
            torch.cuda.synchronize()
            print("queries absorbed and a token written ran,", impl, flush=True)
    if "gluon" in impls:
        for n, k in ((208, 144), (128, 256)):
            heads = make_heads(20, 3, n, k, device="cuda")
            fp8_linear(*heads.tensors, torch.bfloat16, impl="heads")
            torch.cuda.synchronize()
            print("products of heads ran", flush=True)
        for spent in (False, True):  # of the last
            heads_quantized(heads.x, heads.weight, heads.weight_descale, spent=spent, impl="heads")
            torch.cuda.synchronize()
            print("heads quantized ran, spent" if spent else "heads quantized ran", flush=True)


if __name__ == "__main__":
    main()
