"""``mlacompile::quantize_rows``: rows in FP8 for a product, with what stands before it, in one pass over them.

    total = x + added                                 a residual stream takes up what a layer made
    y     = total / √(mean(total²) + eps) · norm      an RMS norm
          = act(x) · gated                            or a gate
    q, descale = fp8_quantize(y, 128, e4m3)

Each of these reads rows that the one before has just written; y itself is wanted by the product alone.

The root of a norm is one factor of a whole row, and FP8 values do not depend on it, only their scales do. So it may be
left to the product (``fp8_normed``), which then needs the squares of the row, as sums of STRETCH of them each, and no
program has to see all of a row.

What was only made to be read here is written to memory all the same, when it leaves L2. So a call can be told of what
nobody reads again, and drops it (``lowering/drop_spent.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.geometry import SCALE_GROUP, scale_groups
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import E4M3
from mlacompile.ops.fp8_quantize import fp8_quantize_reference
from mlacompile.ops.row_product import ACTIVATIONS

#: Values of a row whose squares are one sum.
STRETCH = 16 * SCALE_GROUP
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows_reference(
    x: Tensor, added: Tensor | None, norm: Tensor | None, gated: Tensor | None, done: Tensor | None = None, *,
    eps: float, gate: str, parts: bool = False, squares: bool = False, spent: bool = False, beside: int = 0,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """The definition, in float32 between the sum and the quantization. Nothing is dropped."""
    if parts:
        x = sum(x[1:], x[0]).to(dtype if added is None else added.dtype)
    x, rest = (x, []) if not beside else (x[:, :-beside], [x[:, -beside:].contiguous()])
    total = x.flatten(1) if added is None else x.flatten(1) + added
    y = total.to(torch.float32)
    sums = [torch.stack([part.square().sum(-1) for part in y.split(STRETCH, -1)], -1)] if squares else []
    if norm is not None:
        root = 1.0 if squares else torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = y * root * norm.to(torch.float32)
    if gated is not None:
        y = ACTIVATIONS[gate](y) * gated.to(torch.float32)
    return [*fp8_quantize_reference(y, SCALE_GROUP, E4M3), *([] if added is None else [total]), *rest, *sums]


@torch.library.custom_op("mlacompile::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor,
    added: Tensor | None = None,
    norm: Tensor | None = None,
    gated: Tensor | None = None,
    done: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: str = "",
    parts: bool = False,
    squares: bool = False,
    spent: bool = False,
    beside: int = 0,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """Rows in e4m3 with a scale for every 128 values, as ``fp8_linear`` takes them.

    Args:
        x: ``[M, K]``, or ``[M, H, 128]`` as heads leave it, of 16 or 32 bits; any distances between rows and heads.
        added: ``[M, K]`` in the dtype of x, added first; the sum is rounded to that dtype, and is a result, too.
        parts: x is float32 ``[P, M, K]``, the P parts of what is meant: they are added up and rounded to the dtype of
            ``added``, or to ``dtype`` if nothing is added, first, as products in parts are (``fp8_linear_parts``).
        beside: x, in parts, has so many columns more: they are added up and rounded, too, and that is all.
        norm: ``[K]``, the weight of an RMS norm with ``eps``.
        squares: rows are not divided by the root of their mean square; the sums it is made of are a result.
        gated: ``[M, K]``, what ``gate``, one of ``ACTIVATIONS``, of x is multiplied with; not together with a norm.
        spent: nobody reads x and ``gated`` again: what they hold afterwards is not defined. done: the same of a tensor
            that has been read by what made x, contiguous. Only the lowering can know that, and no schema says it.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        q e4m3 ``[M, K]``, descale float32 ``[M, ⌈K / 128⌉]``, with ``added`` the sum ``[M, K]``, what is ``beside``,
        and with ``squares`` those of every STRETCH values of the sum, float32 ``[M, ⌈K / STRETCH⌉]``; all contiguous.
    Raises:
        UnsupportedInputError: inputs that do not fit together, or a named kernel that cannot take them.
    """
    _check(x, added, norm, gated, gate, parts, squares, done, beside, dtype)
    arguments: Any = (x, added, norm, gated, done)
    settings: Any = {"eps": eps, "gate": gate, "parts": parts, "squares": squares, "spent": spent}
    settings |= {"beside": beside, "dtype": dtype}
    kernel = registry.chosen("quantize_rows", impl, *arguments, **settings)
    if kernel is None:
        return quantize_rows_reference(*arguments, **settings)
    return kernel.run(*arguments, **settings)  # type: ignore[no-any-return]


@quantize_rows.register_fake
def _(
    x: Tensor,
    added: Tensor | None = None,
    norm: Tensor | None = None,
    gated: Tensor | None = None,
    done: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: str = "",
    parts: bool = False,
    squares: bool = False,
    spent: bool = False,
    beside: int = 0,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    return empty_results(x, added, parts=parts, squares=squares, beside=beside, dtype=dtype)


def empty_results(
    x: Tensor, added: Tensor | None, *, parts: bool = False, squares: bool = False, beside: int = 0,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """Room for the results."""
    m, k = _sizes(x, parts, beside)
    results = [x.new_empty((m, k), dtype=E4M3), x.new_empty((m, scale_groups(k)), dtype=torch.float32)]
    if added is not None:
        results.append(added.new_empty((m, k)))
    if beside:
        results.append(x.new_empty((m, beside), dtype=dtype if added is None else added.dtype))
    if squares:
        results.append(x.new_empty((m, -(-k // STRETCH)), dtype=torch.float32))
    return results


def _sizes(x: Tensor, parts: bool, beside: int) -> tuple[int, int]:
    """Rows, and values of a row that are quantized."""
    return (x.shape[1], x.shape[2] - beside) if parts else (x.shape[0], x.shape[1:].numel())


def _check(
    x: Tensor, added: Tensor | None, norm: Tensor | None, gated: Tensor | None, gate: str, parts: bool, squares: bool,
    done: Tensor | None, beside: int, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    if done is not None and not done.is_contiguous():
        raise UnsupportedInputError(
            f"quantize_rows: got done {list(done.shape)} with strides {list(done.stride())}; expected it contiguous"
        )
    if squares and norm is None:
        raise UnsupportedInputError(
            "quantize_rows: got squares=True and no norm; expected one, whose root they are for"
        )
    whole = x.dtype == torch.float32 and x.dim() == 3 and len(x) > 0
    summed = dtype if added is None else added.dtype
    if parts and (not whole or summed not in _FLOATS):
        raise UnsupportedInputError(
            f"quantize_rows: got parts of {x.dtype} {list(x.shape)} and {'nothing' if added is None else 'rows'} to "
            "add them to; expected torch.float32 [P, M, K] and rows [M, K], or the dtype of their sum"
        )
    if beside and (not parts or not 0 < beside < x.shape[2]):
        raise UnsupportedInputError(
            f"quantize_rows: got beside={beside} and {'parts' if parts else 'x'} {list(x.shape)}; expected parts "
            "[P, M, K + beside]"
        )
    heads = x.dim() == 3 and x.shape[2] == SCALE_GROUP
    if x.dtype not in _FLOATS or not (x.dim() == 2 or heads or parts):
        raise UnsupportedInputError(
            f"quantize_rows: got x of {x.dtype} {list(x.shape)}; expected [M, K] or [M, H, {SCALE_GROUP}] of one of "
            f"{', '.join(map(str, _FLOATS))}"
        )
    m, k = _sizes(x, parts, beside)
    dtype = added.dtype if parts and added is not None else x.dtype
    for name, other in (("added", added), ("gated", gated)):
        if other is not None and (other.shape != (m, k) or other.dtype != dtype):
            raise UnsupportedInputError(
                f"quantize_rows: got {name} of {other.dtype} {list(other.shape)}; expected {dtype} [{m}, {k}]"
            )
    if norm is not None and norm.shape != (k,):
        raise UnsupportedInputError(f"quantize_rows: got norm {list(norm.shape)}; expected [{k}]")
    if (gated is None) != (gate == "") or (gated is not None and (gate not in ACTIVATIONS or norm is not None)):
        raise UnsupportedInputError(
            f"quantize_rows: got gate={gate!r} with {'no' if gated is None else 'a'} tensor to gate and "
            f"{'no' if norm is None else 'a'} norm; expected one of {', '.join(ACTIVATIONS)} with a tensor and without "
            "a norm, or neither"
        )
