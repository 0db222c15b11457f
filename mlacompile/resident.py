"""A model in memory whose linear layers have their weights in FP8 alone, so that memory really falls.

The compile option ``fp8`` quantizes beside the originals: a backend sees tensors, not the modules that own them, and
whoever runs the model in eager mode, as ``generate()`` does with a prompt, still reads them. :func:`quantize` replaces
the layers instead. The model then computes in FP8 in eager mode too, and the backend absorbs its attention as it does
that of a checkpoint in FP8.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from mlacompile.checkpoint import fp8
from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP
from mlacompile.ops.fp8_linear import (
    E4M3,
    WEIGHT_ONLY_ROWS,
    block_grid,
    fp8_dequantize_weight,
    fp8_linear,
    fp8_quantize_weight,
    lost_rows,
)
from mlacompile.ops.fp8_quantize import fp8_quantize

_WIDE = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is e4m3 ``[out, in]`` with a float32 scale for each block of 128 × 128.

    Few rows meet the weight as they are; more are quantized too (``mlacompile::fp8_linear``). In a state dict it is the
    layer that it replaced: ``weight`` in ``dtype``, dequantized. Loading one quantizes again, or takes e4m3 with a
    ``weight_scale_inv`` as it is. Weights read back are within the error of e4m3, and do not change any more when they
    are saved and loaded again.
    """

    def __init__(self, linear: nn.Linear, q: Tensor, descale: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.weight = nn.Parameter(q, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(descale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in]`` → ``[…, out]`` in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] <= WEIGHT_ONLY_ROWS:
            out = fp8_linear(rows, None, self.weight, self.weight_scale_inv, x.dtype)
        else:
            q, descale = fp8_quantize(rows, SCALE_GROUP, E4M3)
            out = fp8_linear(q, descale, self.weight, self.weight_scale_inv, x.dtype)
        out = out.reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = fp8_dequantize_weight(self.weight, self.weight_scale_inv, self.dtype)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name, scale = prefix + "weight", prefix + "weight_scale_inv"
        shape = (self.out_features, self.in_features)
        missing, unexpected, errors = args[2:5]
        weight = state_dict.get(name)
        if weight is None:
            missing.append(name)
        elif tuple(weight.shape) != shape:
            errors.append(f"size mismatch for {name}: got {list(weight.shape)}, expected {list(shape)}")
        elif weight.dtype == E4M3:
            self._take(weight, state_dict.get(scale), name, errors)
        elif weight.dtype in _WIDE:
            q, descale = fp8_quantize_weight(weight)
            self._take(q, descale, name, errors)
        else:
            errors.append(f"{name}: got {weight.dtype}, expected a floating point dtype or {E4M3}")
        bias = state_dict.get(prefix + "bias")
        if self.bias is not None and bias is None:
            missing.append(prefix + "bias")
        elif self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)
        known = {name, scale} | ({prefix + "bias"} if self.bias is not None else set())
        unexpected += [key for key in state_dict if key.startswith(prefix) and key not in known]

    def _take(self, weight: Tensor, descale: Tensor | None, name: str, errors: list[str]) -> None:
        grid = block_grid(*weight.shape)
        if descale is None or tuple(descale.shape) != grid or descale.dtype != torch.float32:
            got = "no" if descale is None else f"{descale.dtype} {list(descale.shape)}"
            errors.append(f"{name}_scale_inv: got {got} scales, expected torch.float32 {list(grid)} beside e4m3")
            return
        with torch.no_grad():
            self.weight.view(torch.uint8).copy_(weight.view(torch.uint8))
            self.weight_scale_inv.copy_(descale)


@dataclass(frozen=True)
class Resident:
    """What was done to a model in memory. quantized: paths of layers in FP8; kept: the others, each with the reason.
    Bytes of all parameters, before and after."""

    quantized: tuple[str, ...]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} linear layers in FP8: {self.bytes_after / 1e9:.3f} GB, "
            f"{self.bytes_after / max(self.bytes_before, 1):.2f} of {self.bytes_before / 1e9:.3f} GB"
        ]
        return "\n".join([*lines, *(f"  {path} stays as it is: {reason}" for path, reason in self.kept.items())])


@overload
def quantize(source: nn.Module, *, keep: Iterable[str] = ()) -> Resident: ...
@overload
def quantize(source: str | Path, out: str | Path, **settings: Any) -> fp8.Quantization: ...
def quantize(source: Any, out: str | Path | None = None, **settings: Any) -> Any:
    """The weights of linear layers in FP8, one scale a block of 128 × 128: of a model in memory, or of a checkpoint.

    Args:
        source: a model, changed in place, its original weights released; or a folder in Hugging Face's layout, of which
            ``out`` becomes a copy (:func:`mlacompile.checkpoint.fp8.quantize` says which settings there are).
        keep: patterns (``*.kv_b_proj``) of layers that stay as they are, besides the output head and routers.
    Returns:
        What was quantized, what was not and why, and bytes before and after.
    Raises:
        UnsupportedInputError: a weight holds values that are not finite, or nothing is left to quantize.
    """
    if not isinstance(source, nn.Module):
        if out is None:
            raise UnsupportedInputError(
                "quantize: a checkpoint needs `out`, the folder to make; only a model needs none"
            )
        return fp8.quantize(source, out, **settings)
    if out is not None:
        raise UnsupportedInputError("quantize: a model is changed in place and has no `out`; pass a folder instead")
    return _in_place(source, **settings)


def _in_place(model: nn.Module, *, keep: Iterable[str] = ()) -> Resident:
    from mlacompile.integrations.fp8_modules import Modules

    patterns, kept_modules = tuple(keep), Modules.of(model).kept
    before = _bytes(model)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}")
    kept: dict[str, str] = {}
    for path, linear in linears.items():
        if path in kept_modules:
            reason: str | None = "an output head or a router"
        elif any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            reason = "asked for"
        else:
            reason = _why_not(linear, [o for o in owners[id(linear.weight)] if o != f"{path}.weight"])
        if reason is not None:
            kept[path] = reason
    taken = [path for path in linears if path not in kept]
    if not taken:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in kept.items()) or "it has none"
        raise UnsupportedInputError(f"quantize: no linear layer of the model can be in FP8 ({reasons})")
    for path in taken:
        if not bool(linears[path].weight.isfinite().all()):
            raise UnsupportedInputError(
                f"quantize: {path}.weight holds values that are not finite; nothing was changed"
            )
    done = []
    for path in taken:
        linear = linears.pop(path)
        # Never inference tensors: their changes leave no trace, and what is derived from them could grow old.
        with torch.inference_mode(False), torch.no_grad():
            q, descale = fp8_quantize_weight(linear.weight.detach())
        if lost := len(lost_rows(linear.weight, q)):
            kept[path] = f"{lost} rows of its weight would become zero beside others that are far larger"
            continue
        model.set_submodule(path, QuantizedLinear(linear, q, descale).train(model.training))
        done.append(path)
    return Resident(tuple(done), kept, before, _bytes(model))


def _why_not(linear: nn.Linear, others: list[str]) -> str | None:
    """Why the weight of a layer cannot be released, or None."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, which may read its weight in ways of its own"
    if others:
        return f"its weight is also {', '.join(others)}"
    if linear.weight.dtype not in _WIDE or linear.weight.is_meta:
        return f"its weight is {linear.weight.dtype} on {linear.weight.device}"
    if min(linear.weight.shape) < SCALE_GROUP:
        return f"its weight {list(linear.weight.shape)} is smaller than a block of {SCALE_GROUP} × {SCALE_GROUP}"
    if linear._forward_hooks or linear._forward_pre_hooks or hasattr(linear, "parametrizations"):
        return "it has hooks or parametrizations, which a new layer would not have"
    return None


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())
