"""``mlacompile::row_product``: one row times weights, as every product of a decode step for one sequence is.

    out = x · wᵀ                                     one result for each weight
    out = rms(x) · wᵀ                                norm: the row is normalized on the way in
    out = x · wᵀ + added                             added: a residual on the way out
    out = act(x · w₀ᵀ) · (x · w₁ᵀ)                   gate: two weights, one result

Weights have the dtype of the row, or are FP8 with a scale for every block of 128 × 128, as in ``fp8_linear``. Each is
read once to be used once, so the only thing that counts is how fast it is read. Weights that multiply
the same row are one call: one launch then reads them all. What stands around a product and is a row itself costs
nothing beside its weights, and a launch of its own where it is left outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.kernels import registry
from mlacompile.ops.fp8_linear import check_weight, fp8_dequantize_weight_reference

_LEFT = (torch.float32, torch.bfloat16, torch.float16)
#: Activations by name, on float32 or wider.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def row_product_reference(
    x: Tensor,
    weights: list[Tensor],
    descales: list[Tensor],
    norm: Tensor | None,
    added: Tensor | None,
    *,
    eps: float,
    gate: str,
    early: bool = False,
) -> list[Tensor]:
    """The definition, in float32 or wider, rounded once at the end."""
    compute = torch.promote_types(x.dtype, torch.float32)
    if descales:
        weights = [fp8_dequantize_weight_reference(q, s, compute) for q, s in zip(weights, descales, strict=True)]
    row = x.to(compute)
    if norm is not None:
        row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps) * norm.to(compute)
    out = [row @ weight.to(compute).t() for weight in weights]
    if gate:
        out = [ACTIVATIONS[gate](out[0]) * out[1]]
    if added is not None:
        out[0] = out[0] + added.to(compute)
    return [o.to(x.dtype) for o in out]


@torch.library.custom_op("mlacompile::row_product", mutates_args=())
def row_product(
    x: Tensor,
    weights: list[Tensor],
    descales: list[Tensor],
    norm: Tensor | None = None,
    added: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: str = "",
    early: bool = False,
    impl: str = "auto",
) -> list[Tensor]:
    """``x @ weight.T`` of a single row, for every weight.

    Args:
        x: ``[1, K]``. weights: each ``[N, K]``, rows contiguous, any distance between them; same dtype as x, or e4m3.
        descales: of weights in e4m3, float32 ``[⌈N / 128⌉, ⌈K / 128⌉]`` each; empty otherwise.
        norm: ``[K]``, the weight of an RMS norm with ``eps`` that x goes through first.
        added: ``[1, N]`` in the dtype of x, added to the only result.
        gate: "" or one of ``ACTIVATIONS``: two weights of one shape give one result, act(first) · second.
        early: whether nothing on this stream still writes the weights, as it is with parameters: a kernel may then read
            them before what was launched earlier has ended.
        impl: "auto", "reference", or the name of a kernel, which then must support the inputs.
    Returns:
        ``[1, N]`` for each weight (one when gated) in the dtype of x, computed in float32 and rounded once.
    Raises:
        UnsupportedInputError: inputs that do not fit together, or a named kernel that cannot take them.
    """
    _check(x, weights, descales, norm, added, gate)
    arguments, settings = (x, weights, descales, norm, added), {"eps": eps, "gate": gate, "early": early}
    kernel = registry.chosen("row_product", impl, *arguments, **settings)
    if kernel is None:
        return row_product_reference(x, weights, descales, norm, added, eps=eps, gate=gate)
    return kernel.run(*arguments, **settings)  # type: ignore[no-any-return]


@row_product.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    descales: list[Tensor],
    norm: Tensor | None = None,
    added: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: str = "",
    early: bool = False,
    impl: str = "auto",
) -> list[Tensor]:
    return [x.new_empty((1, weight.shape[0])) for weight in (weights[:1] if gate else weights)]


def _check(
    x: Tensor, weights: list[Tensor], descales: list[Tensor], norm: Tensor | None, added: Tensor | None, gate: str
) -> None:
    if descales and len(descales) != len(weights):
        raise UnsupportedInputError(f"row_product: got {len(descales)} scales for {len(weights)} weights")
    for weight, descale in zip(weights, descales, strict=False):
        check_weight("row_product", weight, descale)
    for weight in weights:
        dtype = x.dtype == weight.dtype or (descales and x.dtype in _LEFT)
        if x.dim() != 2 or weight.dim() != 2 or x.shape != (1, weight.shape[1]) or not dtype:
            raise UnsupportedInputError(
                f"row_product: got x {x.dtype} {list(x.shape)} and weight {weight.dtype} {list(weight.shape)}; "
                "expected [1, K] and [N, K] of one dtype, or of e4m3 with scales"
            )
    if norm is not None and norm.shape != (x.shape[1],):
        raise UnsupportedInputError(f"row_product: got norm {list(norm.shape)}; expected [{x.shape[1]}]")
    if gate and (gate not in ACTIVATIONS or len(weights) != 2 or weights[0].shape != weights[1].shape):
        shapes = [list(w.shape) for w in weights]
        raise UnsupportedInputError(
            f"row_product: got gate={gate!r} and weights {shapes}; "
            f"expected one of {', '.join(ACTIVATIONS)} and two weights of one shape"
        )
    if added is not None:
        results = 1 if gate else len(weights)
        if results != 1 or added.shape != (1, weights[0].shape[0]) or added.dtype != x.dtype:
            raise UnsupportedInputError(
                f"row_product: got added {added.dtype} {list(added.shape)} for {results} results; "
                f"expected {x.dtype} [1, {weights[0].shape[0]}] for one result"
            )
