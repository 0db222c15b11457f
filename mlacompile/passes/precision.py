"""In what precision a model computes attention, where it mixes several.

    q.float() @ k.float().T         scores of bfloat16 operands: widening a value adds nothing to it
    autocast                        float32 weights and latents, rounded to bfloat16 before each product

What counts is the dtype that keys and values are made in. Attention on the latent uses that one throughout.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch.fx import Node

from mlacompile.passes.pull import REARRANGE

aten = torch.ops.aten


def working_dtype(q: Node, k: Node, v: Node) -> torch.dtype:
    """The dtype that attention over these can be computed in without loss against the model itself."""
    return reduce(torch.promote_types, (before_widening(x) for x in (q, k, v)))


def before_widening(node: Node) -> torch.dtype:
    """The narrowest dtype that holds all a tensor holds, as far as casts show it."""
    own: torch.dtype = node.meta["val"].dtype
    args: Any = node.args
    if node.op != "call_function":
        return own
    if node.target is aten._to_copy.default:
        inner = before_widening(args[0])
        return inner if torch.promote_types(inner, own) == own and inner.is_floating_point else own
    if node.target in REARRANGE or node.target in (aten.expand.default, aten.slice.Tensor):
        return before_widening(args[0])
    if node.target is aten.cat.default:
        return reduce(torch.promote_types, map(before_widening, args[0]))
    return own
