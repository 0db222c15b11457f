"""What instructions of PTX that kernels write out compute, for kernels that run as Python."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from tests.kernels.registers_in_python import Tensor, from_e4m3, made, to_e4m3


def of_words(words: Any, kind: torch.dtype) -> torch.Tensor:
    """The two numbers of each word."""
    return torch.from_numpy(np.ascontiguousarray(words)).view(kind).view(*np.shape(words), 2)


def to_words(numbers: torch.Tensor) -> Tensor:
    return made(numbers.contiguous().view(torch.int32)[..., 0].numpy())


def assembly(code: str, constraints: str, args: list[Any], dtype: Any = None, **_: Any) -> Any:
    """In place of ``gl.inline_asm_elementwise``."""
    if "{a0, a1}" in code:  # four FP8 values to two words of float16, times a factor
        kind = torch.float8_e5m2 if "e5m2" in code else torch.float8_e4m3fn
        words = np.ascontiguousarray(args[0])
        values = torch.from_numpy(words.view(np.uint8)).view(kind).half().view(*words.shape, 4)
        if len(args) > 1:
            factors = torch.from_numpy(np.ascontiguousarray(args[1]).view(np.float16)).view(*words.shape, 2)
            values = values * factors.repeat(1, 1, 2)
        return tuple(
            made(half.contiguous().numpy().view(np.int32)[..., 0]) for half in (values[..., :2], values[..., 2:])
        )
    if "sub.f16x2" in code:  # a number in e4m3, and what that leaves of it
        high = from_e4m3(to_e4m3(args[0]))
        rest = np.asarray(args[0]).astype(np.float16).astype(np.float32) - high
        rest = rest * (16 if "mul.rn.f16x2" in code else 1)
        return made(high), made(from_e4m3(to_e4m3(rest)))
    if "mov.b32 $1, $2" in code:  # the word of two neighbours, in place of both
        low, high = (np.asarray(args[0]).astype(np.uint16).astype(np.uint32)[..., i::2] for i in (0, 1))
        return made(np.repeat(low | high << 16, 2, -1).view(np.int32))
    words_in_place_of_both = np.asarray(args[0]).dtype == np.int32
    if words_in_place_of_both and any(x in code for x in ("e4m3x2", "0x6420", "0x6240")):
        words = np.asarray(args[0]).view(np.uint32)
        pairs = np.where(np.arange(words.shape[-1]) % 2, words >> 16, words & 0xFFFF)
        times = np.asarray(args[1]) if len(args) > 1 else np.float16(1)
        if "0x6240" in code:  # of four tokens the third comes second
            pairs = pairs.reshape(*pairs.shape[:-1], -1, 4)[..., [0, 2, 1, 3]].reshape(pairs.shape)
        halves = (from_e4m3(((pairs >> shift) & 255).astype(np.uint8)).astype(np.float16) for shift in (0, 8))
        return tuple(made(half * times) for half in halves)
    if "fma.rn.f16x2 $0" in code:  # the same of a group of columns, added to those before
        return made((args[0] + args[1] * np.float16(1 / 16)) * args[2] + args[3])
    if "mul.rn.f16x2 x, $2, $3" in code:  # and the sum of groups
        return made((args[0] * args[1]).astype(np.float32))
    if "fma.rn.f32" in code:  # a block times its factors, added to those before
        return made(args[0] * args[1] + args[2])
    if "fma.rn.f16x2" in code:  # sums of both parts of a query
        return made(((args[0] + args[1] * np.float16(1 / 16)) * args[2]).astype(np.float32))
    if "shfl.sync.bfly" in code:  # a thread keeps one of two words and puts what another has of it to that
        kind, put = (torch.bfloat16, torch.fmax) if "max.bf16x2" in code else (torch.float16, torch.add)
        one, two = (of_words(x, kind) for x in args[:2])
        keeps_second = torch.from_numpy(np.asarray(args[2])[:, :1, None] != 0)
        distance = int(re.search(r"given, given, (\d+)", code)[1]) // 4  # type: ignore[index]
        other = np.arange(len(keeps_second)) ^ distance
        return to_words(torch.where(keeps_second, put(two, two[other]), put(one, one[other])))
    if "x2.f32 $0, $2, $1" in code and "e4m3" not in code:  # two numbers to a word
        kind = torch.bfloat16 if "bf16x2" in code else torch.float16
        return to_words(torch.from_numpy(np.stack([np.asarray(x) for x in args], -1)).to(kind))
    if "0xffff0000" in code or code.startswith("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32"):  # and back
        both = of_words(args[0], torch.bfloat16 if "0xffff0000" in code else torch.float16).float().numpy()
        return tuple(made(np.ascontiguousarray(x)) for x in np.moveaxis(both, -1, 0))
    if "e4m3x2.f32 $0, $2, $1" in code:  # two numbers to a pair of FP8 values
        first, second = (to_e4m3(x).astype(np.uint16) for x in args)
        return made((first | second << 8).view(np.int16))
    if "e4m3x2" in code:  # pairs of FP8 values to float16
        pairs = np.asarray(args[0])
        return tuple(made(from_e4m3(((pairs >> shift) & 255).astype(np.uint8))) for shift in (0, 8))
    if "rcp.approx" in code:
        return made(np.float32(1) / args[0])
    if "griddepcontrol" in code:
        return None
    assert "mov.b32" in code
    return args[0]
