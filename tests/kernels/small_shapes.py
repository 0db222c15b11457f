"""Every GPU kernel of ``mla_decode`` once on small ragged shapes, for compute-sanitizer.

    compute-sanitizer --tool racecheck python -m tests.kernels.small_shapes

Nothing is compared here; ``test_gpu.py`` does that.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mlacompile.ops import mla_decode
from mlacompile.testing.latents import LatentCase, in_one_run, make_inputs, paged, quantized

CASE = LatentCase(
    batch=2, heads=20, tokens=152, rank=512, rope=64, dtype=torch.bfloat16, start=True, length=True, poison=True
)


def main() -> None:
    impls = ["triton"] + ["gluon"] * (torch.cuda.get_device_capability()[0] == 9)
    plain = make_inputs(CASE, device="cuda")
    per_token, _ = quantized(make_inputs(CASE, device="cuda"), per="token")
    per_block, _ = quantized(make_inputs(CASE, device="cuda"), per="block")
    in_place, _ = quantized(make_inputs(replace(CASE, heads=40), device="cuda"), per="token")  # not by FP8 products
    calls = [plain, paged(plain, 64), per_token, paged(per_token, 64), in_place, in_one_run(paged(per_block, 64))]
    for inputs in calls:
        for impl in impls:
            mla_decode(*inputs.tensors, **inputs.keywords, impl=impl)
            torch.cuda.synchronize()
            print(impl, "ran", flush=True)
    if "gluon" in impls:  # which is chosen for longer rows only
        from mlacompile.kernels.mla_decode.hopper_launch import mla_decode_hopper
        from mlacompile.kernels.mla_decode.plan import HopperPlan

        plan = HopperPlan(2, turned=True)
        mla_decode_hopper(*paged(in_place, 64).tensors, **in_place.keywords, plan=plan)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        print("FP8 products of 40 rows ran", flush=True)


if __name__ == "__main__":
    main()
