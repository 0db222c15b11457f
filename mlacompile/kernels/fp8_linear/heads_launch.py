"""Launches the Hopper kernel of products of heads, whose results are quantized or not."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels.drop import in_whole_lines
from mlacompile.kernels.fp8_linear.supports import GROUP_ROWS
from mlacompile.kernels.launch import Launch, chained
from mlacompile.ops.heads_quantized import empty_results


def fp8_linear_heads(x: Tensor, x_descale: None, weight: Tensor, weight_descale: Tensor, dtype: Any) -> Tensor:
    """``fp8_linear`` by the kernel, for inputs that ``heads_reasons`` has nothing against."""
    out = x.new_empty((*x.shape[:2], weight.shape[1]))
    heads_launch(x, weight, weight_descale, out)()
    return out


def heads_quantized_hopper(
    x: Tensor, weight: Tensor, weight_descale: Tensor, *, spent: bool = False
) -> tuple[Tensor, Tensor]:
    """``heads_quantized`` by the same kernel."""
    results = empty_results(x)
    heads_launch(x, weight, weight_descale, results, spent=spent)()
    return results


def heads_launch(
    x: Tensor, weight: Tensor, weight_descale: Tensor, out: Tensor | tuple[Tensor, Tensor], *, spent: bool = False
) -> Launch:
    """The launch. out: ``[H, M, N]``, or ``[M, H · 128]`` in FP8 and its scales. Meta tensors do, to compile without a
    GPU."""
    from mlacompile.kernels.fp8_linear.heads import _fp8_heads_kernel

    whole, rows = (None, out) if isinstance(out, tuple) else (out, (None, None))
    spent = spent and x.shape[2] % SCALE_GROUP == 0 and in_whole_lines(x)
    arguments = {
        **product_arguments(x, weight, weight_descale, whole),
        "p_q": rows[0], "p_q_descale": rows[1], "p_spent": x if spent else None,
        "stride_xh": x.stride(0), "stride_xm": x.stride(1), "groups": x.shape[0],
    }  # fmt: skip
    return Launch(_fp8_heads_kernel, (x.shape[0],), arguments, {"num_warps": 8, **chained(x.device)})


def product_arguments(x: Tensor, weight: Tensor, weight_descale: Tensor, out: Tensor | None) -> dict[str, Any]:
    """What the product of all heads is made of, and where it is left."""
    n, k = (scale_groups(size) * SCALE_GROUP for size in weight.shape[1:])
    return {
        "d_x": _descriptor(x, GROUP_ROWS), "d_w": _descriptor(weight, SCALE_GROUP), "p_descale": weight_descale,
        "d_out": None if out is None else _descriptor(out, GROUP_ROWS), "M": x.shape[1],
        "stride_dh": weight_descale.stride(0), "stride_dn": weight_descale.stride(1), "N": n, "K": k,
    }  # fmt: skip


def _descriptor(t: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of one head, so many rows and 128 columns of ``[H, rows, K]``."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * t.itemsize, rank=3)
    unit = 16 // t.itemsize  # strides come in whole 16 bytes, of dimensions with a single element too
    strides = [s if s % unit == 0 else unit for s in t.stride()[:-1]] + [1]
    return TensorDescriptor(t, list(t.shape), strides, [1, rows, SCALE_GROUP], layout)
