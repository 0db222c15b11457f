"""``absorb_and_write``: its checks, its kernels in Triton's interpreter and as Python, what they compile to, their
parity on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry
from mlacompile.kernels.absorb_and_write.supports import hopper_reasons, triton_reasons
from mlacompile.kernels.device import SMEM
from mlacompile.ops.absorb_and_write import absorb_and_write, absorb_and_write_reference, empty_results
from mlacompile.ops.write_latents import write_latents_reference
from mlacompile.testing.absorbed import AbsorbCase, Absorbed, make_absorbed, wrong_in
from mlacompile.testing.heads import make_heads
from mlacompile.testing.scaled import exact, worst
from mlacompile.testing.written import WriteCase, differences, make_write


@pytest.mark.parametrize("kind", ["token", "block", "static"])
def test_as_an_op(kind: str) -> None:
    case = AbsorbCase(3, 2, 128, 64, 8, kind=kind)
    assert not wrong_in(case, "reference")
    made = make_absorbed(case)
    # The others compare inputs, which PyTorch cannot in FP8.
    torch.library.opcheck(absorb_and_write, made.arguments, made.settings, test_utils="test_faketensor")


def test_wrong_inputs_say_what_was_expected() -> None:
    made = make_absorbed(AbsorbCase(3, 2, 128, 64, 8))
    x, weight, *rest = made.arguments
    for wrong in ((x[0], weight), (x, weight[:1]), (x, weight.float())):
        with pytest.raises(UnsupportedInputError, match=r"expected \[H, M, K\]"):
            absorb_and_write(*wrong, *rest, **made.settings)
    for impl in ("triton", "heads"):
        with pytest.raises(UnsupportedInputError, match="cannot take these inputs"):
            absorb_and_write(*made.arguments, **made.settings, impl=impl)


def test_kernel_says_why_not() -> None:
    made = make_absorbed(AbsorbCase(3, 2, 128, 64, 8, dtype=torch.float32))
    reasons = "; ".join(triton_reasons(*made.arguments, **made.settings))
    assert "the kernel multiplies in float16, bfloat16 or FP8" in reasons
    assert reasons.count("CUDA") == 1


def test_hopper_kernel_says_why_not() -> None:
    def reasons(case: AbsorbCase, **settings: Any) -> str:
        made = make_absorbed(case)
        return "; ".join(hopper_reasons(*made.arguments, **made.settings | settings))

    case = AbsorbCase(3, 2, 128, 64, 8)
    assert reasons(case).count(";") == 0, "only that there is no GPU here"
    assert "CUDA" in reasons(case)
    assert "x is torch.float32" in reasons(replace(case, dtype=torch.float32))
    assert "x has 65 rows, the kernel takes 1 to 64" in reasons(replace(case, rows=65))
    assert "a head of [512, 384]" in reasons(replace(case, rank=512, nope=384))
    assert "groups of 64 values" in reasons(replace(case, kind="block"), group=64), "of what is written, too"


@pytest.mark.parametrize(("rows", "name"), [(1, "triton"), (16, "triton"), (17, "heads"), (64, "heads")])
def test_which_kernel_is_chosen(rows: int, name: str) -> None:
    made = make_absorbed(AbsorbCase(rows, 128, 512, 128, 64, device="meta"))
    kernels = registry.kernels("absorb_and_write")
    assert next(k.name for k in kernels if not k.slower(*made.arguments, **made.settings)) == name


def test_kernel_logic() -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    script = Path(__file__).with_name("interpreted_absorb.py")
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(script.parent)])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("kind", ["token", "block"])
def test_it_is_both_kernels_and_no_more(kind: str) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    from mlacompile.kernels.absorb_and_write.launch import launch
    from mlacompile.testing.sass import compile_for, table

    made = make_absorbed(AbsorbCase(64, 128, 512, 128, 64, kind=kind, device="meta"))
    absorbed = torch.empty(128, 64, 512, dtype=torch.bfloat16, device="meta")
    one = launch(*made.product, made.write.arguments, absorbed, made.write.arguments[2], **made.settings)
    assert one.grid == (64 * 9 + 128 * 8,)
    built = compile_for(one.kernel, one.arguments, one.options, name=f"absorb_and_write {kind}")
    print(table([built]))
    assert built.local_memory == built.spill_bytes == built.too_early == 0
    assert built.serialized <= 1, "an assertion is a call, and products wait for one another: no slower, measured"
    assert built.counts["HGMMA"] == 128 // 16
    assert built.counts["UTMALDG"] == 2
    assert built.registers <= 128, "four programs an SM"


@pytest.mark.parametrize("kind", ["token", "block", "static"])
def test_the_hopper_kernel_multiplies_beside_the_write(
    kind: str, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    from mlacompile.kernels.absorb_and_write.hopper_launch import hopper_launch
    from mlacompile.testing.sass import compile_for, table

    made = make_absorbed(AbsorbCase(64, 128, 512, 128, 64, kind=kind, device="meta"))
    absorbed = torch.empty(128, 64, 512, dtype=torch.bfloat16, device="meta")
    one = hopper_launch(*made.product, made.write.arguments, absorbed, made.write.arguments[2], **made.settings)
    assert one.grid == (128,)
    built = compile_for(one.kernel, one.arguments, one.options, name=f"absorb_and_write, Hopper {kind}")
    record_property("compiled", table([built]))
    assert built.local_memory == built.spill_bytes == built.unordered == 0
    assert built.serialized <= 1, "as above"
    assert built.counts["HGMMA"] == 4 * 128 // 16
    assert built.counts["UTMALDG"] == 4 + 1
    assert built.counts["UTMASTG"] == 4
    assert built.counts["HMMA"] == built.counts["LDGSTS"] == 0
    assert built.registers <= 168, "12 warps share the registers until the partitions take theirs"
    assert built.smem <= SMEM


def _beyond(case: WriteCase) -> list[torch.Tensor]:
    """Which bytes of each cache a write leaves as they are, whatever they are."""
    masks: list[torch.Tensor] = []
    for byte in (0x11, 0x22):
        write = make_write(case)
        for cache in write.caches:
            cache.view(torch.uint8).fill_(byte)
        write_latents_reference(*write.arguments, **write.settings)
        same = [cache.view(torch.uint8) == byte for cache in write.caches]
        masks = [a & b for a, b in zip(masks, same, strict=True)] if masks else same
    return masks


def in_python(got: Absorbed) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hopper kernel's own text, its partitions as threads. What is not written is NaN."""
    from mlacompile.kernels.absorb_and_write import hopper
    from mlacompile.kernels.absorb_and_write.hopper_launch import hopper_launch
    from mlacompile.kernels.fp8_linear import heads
    from tests.kernels import gluon_in_python

    results = empty_results(*got.product[:2], got.write.arguments[0], got.write.arguments[2])
    for result in results:
        result.fill_(torch.nan)
    launch = hopper_launch(*got.product, got.write.arguments, *results, **got.settings)
    gluon_in_python.run([hopper, heads], launch)
    return results


@pytest.mark.parametrize("kind", ["token", "block", "static", "fused"])
@pytest.mark.parametrize(
    ("write", "heads", "k"),
    [
        (WriteCase(5, 1, 192, 16, 3), 3, 128),
        (WriteCase(40, 1, 384, 24, 2, pairs="interleaved to halves"), 2, 64),
        (WriteCase(3, 5, 128, 32, 7, pairs="halves", norm=False), 2, 144),
        (WriteCase(2, 2, 208, 8, 0, pairs=""), 1, 16),
        (WriteCase(1, 1, 512, 64, 20), 4, 128),
    ],
    ids=str,
)
def test_in_python(write: WriteCase, heads: int, k: int, kind: str) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    product = make_heads(write.batch * write.tokens, heads, write.rank, k, dtype=torch.float16)
    factors = product.x, product.weight, product.weight_descale
    case = replace(write, kind=kind, dtype=torch.float16, capacity=9)
    got, want = (Absorbed(factors, make_write(case)) for _ in range(2))
    for made in (got, want):
        made.settings["rope_stored"] = torch.float16  # NumPy has no bfloat16
    absorbed, turned = in_python(got)
    assert not worst(absorbed, *exact(product, torch.float16))
    _, queries = absorb_and_write_reference(*want.arguments, **want.settings)
    assert not differences(got.write, *((turned, want.write, queries) if write.heads else (None, want.write, None)))
    for cache, before, beyond in zip(got.write.caches, make_write(case).caches, _beyond(case), strict=True):
        assert torch.equal(cache.view(torch.uint8)[beyond], before.view(torch.uint8)[beyond])


def test_groups_that_are_not_finite_or_zero_in_python() -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    made = [make_absorbed(AbsorbCase(5, 2, 256, 64, 16, "block", torch.float16)) for _ in range(2)]
    for each in made:
        each.settings["rope_stored"] = torch.float16
        latent, norm = each.write.arguments[0], each.write.arguments[3]
        latent[3, 0, 200] = torch.nan
        norm[5], norm[128:] = torch.inf, 0
    got, want = made
    _, turned = in_python(got)
    _, queries = absorb_and_write_reference(*want.arguments, **want.settings)
    assert not differences(got.write, turned, want.write, queries)


def test_a_row_that_the_cache_has_not_is_said_in_python() -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    made = make_absorbed(AbsorbCase(5, 2, 128, 64, 16, "static", torch.float16))
    made.write.arguments[5].fill_(11)
    with pytest.raises(AssertionError, match="the cache has no such row"):
        in_python(made)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("kind", ["token", "block", "block e5m2", "static", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_on_hopper(kind: str, dtype: torch.dtype) -> None:
    for rows, heads, rank, nope, rope in ((64, 128, 512, 128, 64), (17, 20, 256, 64, 32), (33, 5, 384, 192, 24)):
        case = AbsorbCase(rows, heads, rank, nope, rope, kind=kind, dtype=dtype, device="cuda")
        assert not (wrong := wrong_in(case, "heads")), (case, wrong)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
)
@pytest.mark.parametrize("kind", ["token", "block", "block e5m2", "static", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity(kind: str, dtype: torch.dtype) -> None:
    for rows, heads, rank, nope, rope in ((64, 128, 512, 128, 64), (16, 20, 256, 64, 32), (3, 5, 208, 192, 24)):
        case = AbsorbCase(rows, heads, rank, nope, rope, kind=kind, dtype=dtype, device="cuda")
        assert not (wrong := wrong_in(case, "triton")), (case, wrong)
