"""``write_latents``: the reference, its checks, the kernel's logic in Triton's interpreter, what it compiles to, and
its parity on a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlacompile.cache.storage import Storage
from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels.write_latents.supports import triton_reasons
from mlacompile.ops import write_latents, write_latents_reference
from mlacompile.testing.written import CACHES, WriteCase, differences, make_write

STEP = WriteCase(1, 1, 512, 64, 128, dtype=torch.bfloat16, pairs="interleaved to halves")


def _turned(x: torch.Tensor, angles: torch.Tensor, pairs: str) -> torch.Tensor:
    """The rotation of pairs as complex numbers."""
    half = x.shape[-1] // 2
    parts = (x[..., :half], x[..., half:]) if pairs == "halves" else (x[..., ::2], x[..., 1::2])
    turned = torch.complex(*parts) * torch.polar(torch.ones_like(angles), angles)
    joined = [turned.real, turned.imag]
    return torch.stack(joined, dim=-1).flatten(-2) if pairs == "interleaved" else torch.cat(joined, dim=-1)


@pytest.mark.parametrize("pairs", ["interleaved", "halves", "interleaved to halves"])
def test_factors_of_cosines_and_sines_turn_pairs(pairs: str) -> None:
    write = make_write(WriteCase(2, 3, 32, 8, 5, pairs=pairs, dtype=torch.float64))
    angles = torch.randn(2, 3, 4, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    if pairs == "interleaved":
        factors = [torch.stack(x, dim=-1).flatten(-2) for x in ((cos, sin), (-sin, cos))]
    else:
        factors = [torch.cat(x, dim=-1) for x in ((cos, sin), (-sin, cos))]
    arguments = list(write.arguments)
    arguments[4] = torch.stack(factors)
    out = write_latents_reference(*arguments, **write.settings)
    latent, k_pe, q_pe, norm, _, slots, c_cache, k_cache, _ = arguments
    torch.testing.assert_close(out, _turned(q_pe, angles[:, None], pairs))
    torch.testing.assert_close(k_cache[:, 0, slots], _turned(k_pe, angles, pairs))
    normed = torch.nn.functional.rms_norm(latent, (32,), norm, 1e-6)
    torch.testing.assert_close(c_cache[:, 0, slots], normed)
    others = [i for i in range(c_cache.shape[2]) if i not in slots.tolist()]
    assert (c_cache[:, 0, others] == 1).all()
    assert (k_cache[:, 0, others] == 1).all()


@pytest.mark.parametrize("scales", ["block", "token"])
def test_an_fp8_cache_holds_what_its_store_writes(scales: str) -> None:
    case = WriteCase(2, 3, 200, 16, 0, kind=scales, pairs="", norm=False)
    write = make_write(case)
    write_latents(*write.arguments, **write.settings)
    store = Storage.parse("fp8_e4m3", scales).allocate(
        2, case.capacity, 200, 16, compute=torch.float32, device=torch.device("cpu")
    )
    for array in store.arrays().values():
        array.fill_(1)
    latent, k_pe, slots = write.arguments[0], write.arguments[1], write.arguments[5]
    store.write(slots, latent, k_pe)
    for got, want in zip(write.caches, store.arrays().values() if scales == "block" else
                         (store.c_kv, store.k_pe, store.descale), strict=True):  # fmt: skip
        if scales == "token":
            assert torch.equal(got, want)
        else:  # what pads a row is not written
            used = (*range(200), *range(208, 216), *range(224, 256))
            assert torch.equal(got[..., used], want[..., used])


@pytest.mark.parametrize("kind", CACHES)
def test_as_an_op(kind: str) -> None:
    write = make_write(WriteCase(2, 2, 128, 8, 3, kind=kind))
    torch.library.opcheck(write_latents, write.arguments, write.settings)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.ones(2, 32), r"expected \[B, S, R\]"),
        (3, torch.ones(31), r"got norm \[31\]"),
        (4, torch.ones(2, 2, 3, 6), "float32 \\[2, 2, 3, P\\]"),
        (4, None, "queries and no rotation"),
        (5, torch.zeros(3, dtype=torch.int32), "int64"),
        (6, torch.ones(3, 1, 11, 32), r"expected \[2, T, ·\]"),
    ],
)
def test_wrong_inputs_say_what_was_expected(at: int, value: Any, message: str) -> None:
    write = make_write(WriteCase(2, 3, 32, 8, 5))
    arguments = [*write.arguments[:at], value, *write.arguments[at + 1 :]]
    with pytest.raises(UnsupportedInputError, match=message):
        write_latents(*arguments, **write.settings)


def test_kernel_says_why_not() -> None:
    write = make_write(WriteCase(1, 1, 32, 8, 2, dtype=torch.float64))
    arguments = list(write.arguments)
    arguments[6] = arguments[6].transpose(2, 3).contiguous().transpose(2, 3)
    reasons = "; ".join(triton_reasons(*arguments, **write.settings))
    assert "takes float16, bfloat16 and float32" in reasons
    assert "c_cache is not contiguous" in reasons
    with pytest.raises(UnsupportedInputError, match="cannot take these inputs"):
        write_latents(*write.arguments, **write.settings, impl="triton")


def test_kernel_logic() -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    script = Path(__file__).with_name("interpreted_write.py")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("kind", CACHES)
def test_everything_stays_in_registers(kind: str) -> None:
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which the dev extra brings")
    from mlacompile.kernels.write_latents.launch import launch
    from mlacompile.kernels.write_latents.portable import _write_latents_kernel
    from mlacompile.testing.sass import compile_for, table

    write = make_write(replace(STEP, kind=kind, device="meta"))
    (programs,), arguments, options = launch(*write.arguments, write.arguments[2], **write.settings)
    assert programs == 9
    built = compile_for(_write_latents_kernel, arguments, options, capability=90, name=f"write_latents {kind}")
    print(table([built]))
    assert built.local_memory == built.spill_bytes == built.too_early == 0
    assert built.registers <= 64


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pairs", ["interleaved", "halves", "interleaved to halves", ""])
def test_parity(kind: str, dtype: torch.dtype, pairs: str) -> None:
    for b, s, r, p, h in [(1, 1, 512, 64, 128), (3, 2, 200, 24, 5), (64, 1, 512, 64, 16)]:
        case = WriteCase(b, s, r, p, h, kind=kind, pairs=pairs, dtype=dtype, device="cuda")
        got, want = make_write(case), make_write(case)
        q = write_latents(*got.arguments, **got.settings, impl="triton")
        exact = write_latents_reference(*want.arguments, **want.settings)
        assert not differences(got, q if pairs else None, want, exact if pairs else None)
