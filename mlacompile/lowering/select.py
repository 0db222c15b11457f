"""Which kernel computes an op: the first whose ``supports()`` has nothing to say against it.

Where none fits, an op's reference body takes its place in the graph and Inductor compiles that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import GraphModule, Node

import mlacompile.ops.mla_decode_placed  # noqa: F401  (registers the op)
from mlacompile.geometry import scale_groups
from mlacompile.kernels import registry
from mlacompile.kernels.fp8_linear.supports import slower_than_16_bits
from mlacompile.lowering.inline import compiles_fp8
from mlacompile.ops import mla_decode_reference
from mlacompile.ops.fp8_linear import E4M3, WEIGHT_ONLY_ROWS, block_grid, fp8_quantize_weight, lost_rows

_DECODE_ARGS = 9
_PLACED = torch.ops.mlacompile.mla_decode_placed.default


def decode_nodes(gm: GraphModule) -> list[Node]:
    """All ``mla_decode`` calls of a graph."""
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.mlacompile.mla_decode.default))


def select(node: Node, wanted: str) -> tuple[str, list[str]]:
    """Name of the kernel for one ``mla_decode`` call, and why each better one was passed over.

    "inductor" stands for the reference body compiled in place.
    """
    values: list[Any] = [a.meta["val"] if isinstance(a, Node) else a for a in node.args[:_DECODE_ARGS]]
    device = values[0].device.type
    if device == "meta":
        return "chosen on the device", []
    if wanted == "reference":
        return "inductor", []
    settings: dict[str, Any] = {"scale": node.kwargs["scale"], "causal": node.kwargs.get("causal", False)}
    if wanted != "auto":
        reasons = registry.find("mla_decode", wanted).supports(*values, **settings)
        return ("inductor", [f"{wanted}: {'; '.join(reasons)}"]) if reasons else (wanted, [])
    best, passed = registry.best("mla_decode", *values, **settings)
    # On a CPU, that a GPU kernel needs a GPU is no news.
    lines = [f"{name}: {'; '.join(reasons)}" for name, reasons in passed.items() if device != "cpu"]
    return ("inductor" if best is None else best.name), lines


def shorten_calls(gm: GraphModule) -> None:
    """Let calls of the kernel for CPUs go to it directly; the last thing that is done to them, as no pass knows that
    op."""
    for node in decode_nodes(gm):
        if node.kwargs.get("impl") != "cpu":
            continue
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, node.args)) | dict(node.kwargs)
        tensors = tuple(given.get(name) for name in names[:_DECODE_ARGS] if name != "block_table")
        settings = {"scale": given["scale"], "causal": given.get("causal", False)}
        node.target, node.args, node.kwargs = _PLACED, tensors, settings
    gm.recompile()


def reads_fp8(wanted: str, q_latent: torch.Tensor, *args: Any, **settings: Any) -> bool:
    """Whether a call of ``mla_decode`` on an FP8 cache has a kernel, or was to have none.

    wanted: the option ``kernel``.
    """
    if wanted == "reference" or q_latent.device.type == "meta":
        return True
    if wanted != "auto":
        return not registry.find("mla_decode", wanted).supports(q_latent, *args, **settings)
    return registry.best("mla_decode", q_latent, *args, **settings)[0] is not None


def slower_in_fp8(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why ``x @ weight.T`` would not be faster with the weight in FP8 here, or None.

    x ``[(H,) M, K]`` and weight ``[(H,) N, K]`` in 16 or 32 bits, fake or not.
    """
    *heads, n, k = weight.shape
    m, device = x.shape[-2], x.device.type
    if device == "meta":
        return "whether FP8 is faster is decided on the device"
    if device != "cuda":
        return f"no kernel makes FP8 products faster on {device}"
    if not isinstance(m, int):
        return "the number of rows varies, and with it what is faster"
    q, descale = (weight.new_empty(weight.shape, dtype=E4M3), weight.new_empty((*heads, *block_grid(n, k))).float())
    left: tuple[torch.Tensor, torch.Tensor | None] = (x, None)
    if not heads and m > WEIGHT_ONLY_ROWS:
        left = (x.new_empty(x.shape, dtype=E4M3), x.new_empty((m, scale_groups(k))).float())
    best, passed = registry.best("fp8_linear", *left, q, descale, x.dtype)
    if best is None:
        return "; ".join(f"{name}: {' and '.join(reasons)}" for name, reasons in passed.items())
    return slower_than_16_bits(m, n, k, heads[0] if heads else 0)


def spoilt_in_fp8(weight: torch.Tensor) -> str | None:
    """Why a weight would not survive FP8, looked at value by value, or None; also for one that has no values."""
    if weight.device.type == "meta" or isinstance(weight, FakeTensor):
        return None
    with unset_fake_temporarily(), torch.no_grad():
        q, _ = fp8_quantize_weight(weight.detach())
        lost = len(lost_rows(weight, q))
    return f"{lost} rows of the weight would become zero beside others that are far larger" if lost else None


def place_kernels(gm: GraphModule, chosen: dict[Node, str]) -> None:
    """Write the choice into the graph: a kernel's name, or the reference body in place of the op."""
    for node, name in chosen.items():
        kwargs = dict(node.kwargs)
        kwargs.pop("impl", None)
        if name == "inductor" and (node.args[_DECODE_ARGS - 1 :] in ((), (None,)) or compiles_fp8(node.args[0])):  # type: ignore[arg-type]
            node.target = mla_decode_reference
        elif name == "inductor":
            kwargs["impl"] = "reference"
        elif name in {k.name for k in registry.kernels("mla_decode")}:
            kwargs["impl"] = name
        node.kwargs = kwargs
    gm.recompile()
