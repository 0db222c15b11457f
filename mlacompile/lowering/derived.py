"""Values made of weights, kept as long as the weights live, and made again when a weight has changed.

Prefill and decode, and all layers that share one compiled graph, find their values here by the identity of the weights.
A weight counts as changed when its version or its address has: whatever writes to a parameter in the usual ways
(optimizers, ``copy_``, ``load_state_dict``) raises its version. Writing through ``parameter.data`` does not, and is
not seen. Values are written anew in place, so that CUDA graphs that hold their addresses stay right.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlacompile.errors import UnsupportedInputError
from mlacompile.passes.hoist import Hoisted

Compiled = Callable[..., Any]


class _Values:
    """What was made of some weights, and of which version of them."""

    def __init__(self, part: Hoisted, sources: Sequence[Tensor], forget: Callable[[Any], None]) -> None:
        self.part = part
        self.alive = [weakref.ref(s, forget) for s in sources]
        self.stamp = _stamp(sources)
        self.tensors = self._make(sources)
        for tensor in self.tensors:
            torch._dynamo.mark_static_address(tensor)

    def refresh(self, sources: Sequence[Tensor], stamp: Any) -> None:
        """Make them again, at the same addresses."""
        for kept, new in zip(self.tensors, self._make(sources), strict=True):
            kept.view(torch.uint8).copy_(new.view(torch.uint8))
        self.stamp = stamp

    def _make(self, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # Never inference tensors, even when the model is called in that mode: outside it nobody could write them anew.
        with torch.inference_mode(False), torch.no_grad():
            return self.part.make(*sources)  # type: ignore[no-any-return]


_kept: dict[tuple[Any, ...], _Values] = {}
_lock = threading.RLock()


def with_derived(compiled: Compiled, parts: Sequence[Hoisted]) -> Compiled:
    """``compiled``, called with the values of ``parts`` behind its own arguments.

    Raises (when called):
        UnsupportedInputError: a weight was made in inference mode, so that nothing would tell when it changes.
    """
    if not parts:
        return compiled

    def call(*args: Any) -> Any:
        derived: list[Tensor] = []
        for part in parts:
            derived += _values(part, [args[i] for i in part.sources])
        return compiled(*args, *derived)

    return call


def _values(part: Hoisted, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    key = (part.key, *map(id, sources))
    found, stamp = _kept.get(key), _stamp(sources)
    if found is not None and found.stamp == stamp:
        return found.tensors
    with _lock:
        found = _kept.get(key)
        if found is None:
            found = _kept[key] = _Values(part, sources, forget=lambda _: (_kept.pop(key, None), None)[1])
        elif found.stamp != stamp:
            found.refresh(sources, stamp)
    return found.tensors


def _stamp(sources: Sequence[Tensor]) -> tuple[Any, ...]:
    try:
        return tuple((s._version, s.data_ptr()) for s in sources)
    except RuntimeError as error:
        shapes = ", ".join(str(list(s.shape)) for s in sources if s.is_inference())
        raise UnsupportedInputError(
            f"weights of shape {shapes} were made in inference mode, where changes leave no trace, so an FP8 copy of "
            "them could silently grow old. Load the model outside torch.inference_mode(), or use fp8='off'."
        ) from error
