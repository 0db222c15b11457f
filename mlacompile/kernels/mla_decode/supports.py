"""What the GPU kernels cannot take, in words. Needs no Triton, so that asking is always possible."""

from __future__ import annotations

import torch
from torch import Tensor

from mlacompile.kernels.device import capability_of, device_reasons, hopper_device_reasons, interpreted

MAX_RANK = 512  # the float32 output tile of 64 rows then fills half of an SM's registers
MAX_ROPE = 128
MAX_BATCH = 65_535
HOPPER_MAX_ROPE = 64  # two stages of rope keys and the queries' share of shared memory
_INT32 = 2**31


def last_dim_contiguous(x: Tensor) -> Tensor:
    """A copy of what kernels cannot read, anything else as it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def portable_reasons(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    block_table: Tensor | None = None,
    descale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> list[str]:
    """Why the portable kernel cannot run on these inputs; empty when it can. Called like ``mla_decode``.

    On the wrong device that is all: every call on a CPU asks.
    """
    if reasons := device_reasons(q_latent.device):
        return reasons
    dtypes = (torch.float32,) if interpreted() else (torch.float32, torch.bfloat16, torch.float16)
    if q_latent.dtype not in dtypes:
        reasons.append(f"dtype is {q_latent.dtype}, the kernel takes {', '.join(map(str, dtypes))}")
    if descale is not None:
        reasons += _fp8_reasons(c_kv, k_pe, q_latent.device)
    rank, rope = q_latent.shape[3], 0 if q_pe is None else q_pe.shape[3]
    if rank > MAX_RANK:
        reasons.append(f"rank is {rank}, the kernel holds at most {MAX_RANK} in registers")
    if rope > MAX_ROPE:
        reasons.append(f"rope width is {rope}, the kernel takes at most {MAX_ROPE}")
    for name, x in (("c_kv", c_kv), ("k_pe", k_pe)):
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            reasons.append(f"the last dimension of {name} has stride {x.stride(-1)}, the kernel needs 1")
    # Offsets of a batch row are 64-bit; those of a token, a head or a query inside it are 32-bit.
    for name, x in (("q_latent", q_latent), ("q_pe", q_pe), ("c_kv", c_kv), ("k_pe", k_pe), ("mask", mask)):
        if x is not None and sum((n - 1) * abs(st) for n, st in zip(x.shape[1:], x.stride()[1:])) >= _INT32:
            reasons.append(f"one batch row of {name} spans 2^31 elements or more")
    if q_latent.numel() >= _INT32:
        reasons.append(f"q_latent has {q_latent.numel()} elements, the kernel counts rows in 32 bits")
    if q_latent.shape[0] > MAX_BATCH:
        reasons.append(f"batch is {q_latent.shape[0]}, the kernel's grid takes at most {MAX_BATCH}")
    if q_latent.numel() == 0 or c_kv.numel() == 0:
        reasons.append("an input is empty")
    return reasons


def _fp8_reasons(c_kv: Tensor, k_pe: Tensor | None, device: torch.device) -> list[str]:
    """Why the portable kernel cannot read an FP8 cache."""
    if interpreted():
        return []
    e4m3 = any(x is not None and x.dtype == torch.float8_e4m3fn for x in (c_kv, k_pe))
    if not e4m3 or device.type != "cuda" or not torch.cuda.is_available():
        return []
    capability = capability_of(device)
    return ["e4m3 needs compute capability 8.9"] if capability < (8, 9) else []


def hopper_reasons(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    block_table: Tensor | None = None,
    descale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> list[str]:
    """Why the Hopper kernel cannot run on these inputs; empty when it can. Called like ``mla_decode``.

    On the wrong device that is all: every call on a CPU asks.
    """
    return hopper_device_reasons(q_latent.device) or hopper_shape_reasons(
        q_latent, q_pe, c_kv, k_pe, mask, block_table, descale, scale
    )


def hopper_shape_reasons(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    descale: Tensor | None,
    scale: float,
) -> list[str]:
    """The same, whatever the device."""
    if q_latent.numel() == 0 or c_kv.numel() == 0 or (block_table is not None and block_table.numel() == 0):
        return ["an input is empty"]
    reasons = []
    if q_latent.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype is {q_latent.dtype}, the kernel takes torch.bfloat16 and torch.float16")
    if mask is not None:
        reasons.append("there is a mask")
    if not scale > 0:
        reasons.append(f"scale is {scale}, the kernel needs a positive one")
    rank, rope = q_latent.shape[3], 0 if q_pe is None else q_pe.shape[3]
    if rank > MAX_RANK:
        reasons.append(f"rank is {rank}, the kernel holds at most {MAX_RANK} in registers")
    if rope > HOPPER_MAX_ROPE:
        reasons.append(f"rope width is {rope}, the kernel takes at most {HOPPER_MAX_ROPE}")
    for name, x in (("c_kv", c_kv), ("k_pe", k_pe)):
        if x is not None:
            reasons += [f"{name} {reason}" for reason in _copy_reasons(x)]
    if descale is not None:
        reasons += [f"descale {reason}" for reason in _factor_reasons(descale)]
        if k_pe is not None and k_pe.dtype != q_latent.dtype:
            reasons.append(f"the rotary keys are {k_pe.dtype}, beside an FP8 latent the kernel needs {q_latent.dtype}")
        if block_table is not None and c_kv.shape[1] < 32:
            reasons.append(f"pages have {c_kv.shape[1]} tokens, of an FP8 cache the kernel needs 32 or more")
    for name, x in (("q_latent", q_latent), ("q_pe", q_pe)):
        if x is not None and sum((n - 1) * abs(st) for n, st in zip(x.shape[1:], x.stride()[1:])) >= _INT32:
            reasons.append(f"one batch row of {name} spans 2^31 elements or more")
    tokens = c_kv.shape[1] if block_table is None else c_kv.shape[1] * block_table.shape[1]
    if q_latent.shape[0] * (tokens // 64 + 4) >= _INT32 or tokens >= _INT32:
        reasons.append(f"{q_latent.shape[0]} rows of {tokens} tokens are more blocks than 32 bits count")
    return reasons


def _copy_reasons(x: Tensor) -> list[str]:
    """Why TMA cannot copy boxes of a [units, tokens, D] cache, seen as one table of rows."""
    reasons = []
    units, tokens, columns = x.shape
    unit, token, column = x.stride()
    if columns > 1 and column != 1:
        reasons.append(f"has stride {column} in the last dimension, the kernel needs 1")
    if token <= 0 or token * x.element_size() % 16 != 0:
        reasons.append(f"has tokens {token * x.element_size()} bytes apart, the kernel needs a multiple of 16")
    elif x.storage_offset() * x.element_size() % 16 != 0:
        reasons.append("does not begin at a multiple of 16 bytes")
    elif units > 1 and (unit < 0 or unit % token != 0):
        reasons.append(f"has stride {unit} between batch rows or pages, the kernel needs a multiple of {token}")
    elif (units - 1) * (unit // token) + tokens >= _INT32:
        reasons.append("spans 2^31 tokens or more")
    return reasons


def turned_reasons(c_kv: Tensor) -> list[str]:
    """Why the kernel with FP8 products cannot read an FP8 cache, besides what ``hopper_shape_reasons`` says."""
    reasons = []
    if c_kv.dtype != torch.float8_e4m3fn:
        reasons.append(f"the latents are {c_kv.dtype}, FP8 products take {torch.float8_e4m3fn}")
    if c_kv.shape[2] % 2:
        reasons.append(f"rank is {c_kv.shape[2]}, FP8 products write columns in pairs")
    return reasons


def _factor_reasons(descale: Tensor) -> list[str]:
    """Why TMA cannot copy the [units, tokens, G] factors of an FP8 latent."""
    units, tokens, groups = descale.shape
    if groups > 1:
        return _copy_reasons(descale)
    apart = descale.stride(1), descale.stride(0) if units > 1 else tokens
    if apart != (1, tokens) or descale.storage_offset() % 4 != 0 or units * tokens >= _INT32:
        return [f"does not lie in one line (strides {descale.stride()}), which the kernel needs of one factor a token"]
    if units > 1 and tokens % 4 != 0:
        return [f"has rows of {tokens} factors, and TMA copies from multiples of 16 bytes"]
    return []


def hopper_slower(
    q_latent: Tensor,
    q_pe: Tensor | None,
    c_kv: Tensor,
    k_pe: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    block_table: Tensor | None = None,
    descale: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> list[str]:
    """Where the portable kernel was measured to be faster than the Hopper kernel, by 1 to 3 % in batches and by a
    quarter for one sequence (docs/kernels.md)."""
    batch, heads, queries, _ = q_latent.shape
    tokens = c_kv.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    if descale is not None:
        return []
    if batch == 1 and heads * queries <= 64 and tokens <= 1024:
        return ["one short sequence is faster in tiles of 16"]
    if block_table is None and batch >= 64 and heads * queries <= 16:
        return ["up to 16 rows of many sequences are faster in tiles of 16"]
    return []
