"""What the kernels of ``fp8_linear`` cannot take, in words. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels.device import SMEM, capability_of, device_reasons, interpreted, sms_of

GROUP_ROWS = 64  # of x: what a group of four warps of the Hopper kernels multiplies at once
RESERVED = 2048  # bytes of their shared memory for barriers and what warps are told when they begin
MOST_ROWS = 2  # of x: with more, arithmetic outside the tensor cores takes longer than reading the weight
TILE_ROWS = 64  # up to here the Triton kernel reads weights as fast as cuBLASLt, or faster
NARROW = 4096  # weights of fewer rows have too few tiles for cuBLASLt, which does not divide K …
WIDE = 16384  # weights of fewer rows are read as fast by tiles of more programs
WIDEN_ROWS = 16  # of x: with more, a tile of 64 rows is not wasted
MANY_ROWS = 4096  # … unless rows of x make up for it
FEW_ROWS = 256  # of x: with more, by sums of …
FILLED = 0.75  # of all SMs, with heads: with fewer, smaller tiles are faster, …
FILLED_ONCE = (
    0.33  # … or with fewer than this where their results leave quantized, which tiles need a second launch for
)
DEEP = 4096  # … more products than this, cuBLASLt is faster than the Hopper kernel


def rows_reasons(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why the Gluon kernel for few rows cannot run on these inputs; empty when it can."""
    reasons = _reasons(x, weight, weight_descale)
    if interpreted():
        reasons.append("Gluon cannot be interpreted")
    if x.shape[-2] > MOST_ROWS:
        reasons.append(f"x has {x.shape[-2]} rows, the kernel takes up to {MOST_ROWS}")
    return reasons


def tiles_reasons(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why the Triton kernels cannot run on these inputs; empty when they can."""
    reasons = _reasons(x, weight, weight_descale)
    if x_descale is None and x.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"x is {x.dtype}, the kernel multiplies in float16, bfloat16 or FP8")
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.storage_offset() * tensor.itemsize % 16:
            reasons.append(f"{name} begins between two pieces of 16 bytes, which TMA cannot address")
    return reasons


def hopper_reasons(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why the Hopper kernel for many rows cannot run on these inputs; empty when it can."""
    reasons = [*tiles_reasons(x, x_descale, weight, weight_descale, dtype), *_hopper_alone(x.device)]
    if x_descale is None:
        reasons.append("x is not quantized")
    if x.dim() != 2:
        reasons.append("there is a weight for every head")
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"the result is {dtype}, the kernel stores 16 bits")
    if weight.shape[-2] % 8:
        reasons.append(f"rows of {weight.shape[-2]} results are not a multiple of 16 bytes long, which TMA needs")
    return reasons


def stream_reasons(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why the Hopper kernel for few rows cannot run on these inputs; empty when it can."""
    reasons = hopper_reasons(x, x_descale, weight, weight_descale, dtype)
    if x.shape[-2] > 2 * TILE_ROWS:
        reasons.append(f"x has {x.shape[-2]} rows, the kernel takes up to {2 * TILE_ROWS}")
    return reasons


def heads_reasons(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why the Hopper kernel for a weight of each head cannot run on these inputs; empty when it can."""
    reasons = [*tiles_reasons(x, x_descale, weight, weight_descale, dtype), *_hopper_alone(x.device)]
    if x_descale is not None:
        reasons.append("x is quantized, the kernel multiplies in 16 bits")
    if dtype != x.dtype:
        reasons.append(f"the result is {dtype}, the kernel leaves it in the dtype of x")
    if weight.dim() != 3:
        return [*reasons, "there is one weight for all rows"]
    if not 0 < x.shape[-2] <= GROUP_ROWS:
        reasons.append(f"x has {x.shape[-2]} rows, the kernel takes 1 to {GROUP_ROWS}")
    n, k = (scale_groups(size) for size in weight.shape[1:])
    needed = n * k * SCALE_GROUP**2 + (n + k) * GROUP_ROWS * SCALE_GROUP * 2
    if needed > SMEM - RESERVED:
        reasons.append(f"a head of {list(weight.shape[1:])} needs {needed} bytes of shared memory, there are {SMEM}")
    if weight.shape[1] % 8:
        reasons.append(f"rows of {weight.shape[1]} results are not a multiple of 16 bytes long, which TMA needs")
    return reasons


def blas_reasons(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why cuBLASLt's product of scaled blocks (through ``torch.nn.functional.scaled_mm``) cannot run on these."""
    if x.device.type != "cuda" or not torch.cuda.is_available():
        return [f"inputs are on {x.device}, cuBLASLt needs a CUDA device"]
    reasons = []
    if not hasattr(torch.nn.functional, "scaled_mm"):
        reasons.append(f"torch {torch.__version__} has no torch.nn.functional.scaled_mm")
    if capability_of(x.device) != (9, 0):
        reasons.append("cuBLASLt scales blocks of 128 on compute capability 9.0 only")
    if x_descale is None:
        reasons.append("x is not quantized")
    if x.dim() != 2:
        reasons.append("there is a weight for every head")
    if weight.shape[-1] % SCALE_GROUP or weight.shape[-2] % 16:
        reasons.append(f"the weight is {list(weight.shape)}, cuBLASLt needs K in whole blocks and N in multiples of 16")
    if dtype != torch.bfloat16:
        reasons.append(f"the result is {dtype}, and cuBLASLt was tried with bfloat16 only")
    return reasons


def rows_slower(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why tiles are faster where they can serve (measured, docs/kernels.md)."""
    m, n = x.shape[-2], weight.shape[-2]
    if m == 1 or (weight.dim() == 2 and n < NARROW):
        return []
    return [f"tiles are faster with {m} rows by so large a weight"]


def tiles_slower(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why kernels for more rows are faster where they can serve (measured, docs/kernels.md)."""
    m, (n, k) = x.shape[-2], weight.shape[-2:]
    if x_descale is not None and weight.dim() == 2 and stream_faster(m, n):
        return [f"tiles as wide as an SM has time for are faster with {m} rows by [{n}, {k}]"]
    if m <= TILE_ROWS or (m <= 2 * TILE_ROWS and n < NARROW):
        return []
    return [f"kernels for many rows are faster with {m} rows by a weight of {n}"]


def stream_faster(m: int, n: int) -> bool:
    """Whether the Hopper kernel for few rows is the fastest for m rows by a weight of n (measured, docs/kernels.md)."""
    if m <= WIDEN_ROWS or m > 2 * TILE_ROWS:
        return False
    return m <= TILE_ROWS or n >= WIDE


def stream_slower(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why another kernel is faster where both can serve (measured, docs/kernels.md)."""
    m, (n, k) = x.shape[-2], weight.shape[-2:]
    return [] if stream_faster(m, n) else [f"other tiles are faster with {m} rows by [{n}, {k}]"]


def hopper_slower(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype
) -> list[str]:
    """Why cuBLASLt is faster where it can serve (measured, docs/kernels.md)."""
    m, k = x.shape[-2], weight.shape[-1]
    return [f"cuBLASLt is faster with {m} rows by sums of {k}"] if m > FEW_ROWS and k > DEEP else []


def heads_slower(
    x: Tensor, x_descale: Tensor | None, weight: Tensor, weight_descale: Tensor, dtype: torch.dtype,
    least: float = FILLED,
) -> list[str]:  # fmt: skip
    """Why tiles are faster where both can serve (measured, docs/kernels.md). least: of SMs, with a head."""
    m, heads, sms = x.shape[-2], weight.shape[0], sms_of(x.device)
    if m <= WIDEN_ROWS:
        return [f"tiles of fewer rows are faster with {m} rows"]
    if heads < least * sms:
        return [f"tiles of less than a head are on more SMs with {heads} heads"]
    return [f"{heads} heads are more than there are SMs, and taken in two rounds"] if heads > sms else []


def slower_than_16_bits(m: int, n: int, k: int, heads: int) -> str | None:
    """Why m rows by weights [n, k], one or one a head, are not faster in FP8 on a Hopper GPU (measured), or None."""
    if n * k * max(heads, 1) < 1 << 18:
        return "the weight is so small that nothing is gained"
    if heads and m > (TILE_ROWS if n > k else 2 * TILE_ROWS):
        return f"with {m} rows a head the products are not faster in FP8"
    if not heads and 2 * TILE_ROWS < m < MANY_ROWS and n < NARROW:
        return f"a weight of only {n} rows is not faster in FP8 with {m} rows of activations"
    return None


def _hopper_alone(device: torch.device) -> list[str]:
    """Why a kernel in Gluon for Hopper GPUs cannot run there."""
    reasons = ["Gluon cannot be interpreted"] if interpreted() else []
    if device.type == "cuda" and torch.cuda.is_available() and capability_of(device) != (9, 0):
        reasons.append("the kernel is written for compute capability 9.0")
    return reasons


def _reasons(x: Tensor, weight: Tensor, weight_descale: Tensor) -> list[str]:
    reasons = device_reasons(x.device)
    if not reasons and x.device.type == "cuda" and capability_of(x.device) < (8, 9):
        reasons.append("the GPU has no conversions of FP8 (compute capability 8.9 or newer)")
    for name, tensor, unit in (("x", x, 16 // x.itemsize), ("weight", weight, 16)):
        if tensor.stride(-1) != 1:
            reasons.append(f"elements of a row of {name} lie {tensor.stride(-1)} apart, the kernel needs 1")
        apart = [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1][:-1]
        if any(stride % unit for stride in apart) or tensor.shape[-1] % 16:
            reasons.append(f"rows of {name} are not a multiple of 16 bytes long or apart")
    if weight_descale.stride(-1) != 1 and weight_descale.shape[-1] > 1:
        reasons.append("scales of a row of blocks are not contiguous")
    return reasons
