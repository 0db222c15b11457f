"""KL(teacher ‖ student) through a head that both share, without the logits of a batch ever being in memory.

Softmax cross-entropies have a gradient that is known beside their value, (p_student − p_teacher) · head, so the forward
pass leaves a gradient as wide as the hidden state, and logits live for some rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Rows whose logits are in memory at once: enough for a GPU, and 0.4 GB for each of both at 49152 tokens.
_ROWS = 2048


def head_divergence(hidden: Tensor, true: Tensor, head: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(head · true) ‖ softmax(head · hidden)) in nats; differentiable by ``hidden`` alone.

    ``hidden`` and ``true`` are ``[..., M]``, ``head [vocabulary, M]``; all is computed in the head's dtype.
    """
    result: Tensor = _HeadDivergence.apply(hidden.flatten(0, -2), true.flatten(0, -2), head)  # type: ignore[no-untyped-call]
    return result


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, true: Tensor, head: Tensor) -> Tensor:
        piece = _compiled() if hidden.is_cuda else _piece
        total, slopes = head.new_zeros(()), []
        with torch.autocast(hidden.device.type, enabled=False):
            for ours, theirs in zip(hidden.detach().split(_ROWS), true.detach().split(_ROWS)):
                value, slope = piece(ours.to(head.dtype), theirs.to(head.dtype), head)
                total = total + value
                slopes.append(slope)
        ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return slope * (grad / len(slope)), None, None


def _piece(hidden: Tensor, true: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence summed over rows, and its gradient ``[rows, M]``."""
    said, wanted = (F.linear(x, head).log_softmax(-1) for x in (hidden, true))
    likely = wanted.exp()
    return (likely * (wanted - said)).sum(), (said.exp() - likely) @ head


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What is between the products becomes a few kernels, each of which reads the logits once."""
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_piece, dynamic=False)
    return compiled
