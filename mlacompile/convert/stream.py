"""Run the original on text with one layer in memory, and show what every attention layer is given.

The model is the stock one, with parameters that are nowhere; a layer reads its own from the checkpoint when its turn
comes, works through all windows, and forgets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlacompile.convert.source import Source

#: Tokens that a layer works on at once: what an MLP holds meanwhile is several times their size.
_TOKENS_AT_ONCE = 4096


class _Enough(Exception):
    """The last layer that was asked for is through."""


@torch.no_grad()
def layer_inputs(
    source: Source,
    ids: Tensor,
    visit: Callable[[int, Tensor], None],
    *,
    device: str | torch.device = "cpu",
    layers: int | None = None,
) -> None:
    """Call ``visit(i, x)`` for the attention of each layer, in order, with its input ``x [W, T, M]``, float32.

    Args:
        source: the original.
        ids: windows of tokens ``[W, T]``, each from position 0.
        visit: is given ``x`` on ``device``, and may keep it.
        device: where layers run.
        layers: how many, from the first; None is all.
    """
    from transformers import AutoModel

    device = torch.device(device)
    with parameters_nowhere():
        model = AutoModel.from_config(source.model.config, dtype=torch.float32).eval()
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner._buffers.items():
            if buffer is not None:
                buffer_owner._buffers[name] = buffer.to(device)
    count = len(model.layers) if layers is None else layers
    for i in range(count):
        model.layers[i] = _Streamed(source, i, model.layers[i], visit, device, last=i + 1 == count)
    model.layers = model.layers[:count]
    embedding = source.read("model.embed_tokens.weight").float()
    model.embed_tokens.weight = nn.Parameter(embedding.to(device), requires_grad=False)
    try:
        model(input_ids=ids.to(device), use_cache=False)
    except _Enough:
        return


@contextmanager
def parameters_nowhere() -> Iterator[None]:
    """Modules made inside have parameters with shapes and no values (meta), but buffers as usual.

    Unlike making all of it on the meta device, this leaves rotary tables with their numbers.
    """
    register = nn.Module.register_parameter

    def nowhere(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        empty = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, empty)

    nn.Module.register_parameter = nowhere  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Streamed(nn.Module):
    """A decoder layer whose weights are there while it works; all windows pass before the next layer's turn."""

    def __init__(
        self,
        source: Source,
        i: int,
        layer: nn.Module,
        visit: Callable[[int, Tensor], None],
        device: torch.device,
        *,
        last: bool,
    ) -> None:
        super().__init__()
        self.layer, self.last, self.device = layer, last, device
        self._source, self._i, self._visit = source, i, visit

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        at = f"model.layers.{self._i}."
        weights = {name: self._source.read(at + name).float().to(self.device) for name in self.layer.state_dict()}
        self.layer.load_state_dict(weights, assign=True)
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            seen.append(given["hidden_states"] if "hidden_states" in given else args[0])

        attention: Any = self.layer.self_attn
        hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
        windows, length = hidden_states.shape[:2]
        step = max(1, _TOKENS_AT_ONCE // length)
        out = [
            self.layer(hidden_states[start : start + step], **_rows(kwargs, start, step, windows))
            for start in range(0, windows, step)
        ]
        hook.remove()
        self.layer.to("meta")
        self._visit(self._i, torch.cat(seen))
        if self.last:
            raise _Enough
        return torch.cat([part[0] if isinstance(part, tuple) else part for part in out])


def _rows(value: Any, start: int, step: int, windows: int) -> Any:
    """The part of a layer's arguments that belongs to some windows; what all windows share stays as it is."""
    if isinstance(value, Tensor):
        return value[start : start + step] if value.ndim and value.shape[0] == windows else value
    if isinstance(value, dict):
        return {key: _rows(item, start, step, windows) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(item, start, step, windows) for item in value)
    return value
