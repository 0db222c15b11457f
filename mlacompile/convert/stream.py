"""The original's decoder layers with one of them in memory: each reads its weights when its turn comes.

The model is the stock one, made with parameters that are nowhere, so nothing about a family is known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from mlacompile.convert.form import GQALayer, OneByOne
from mlacompile.convert.source import Source


class Blocks(Sequence[nn.Module]):
    """Decoder layers in float32, without their attention: a caller puts its own there. One is loaded at a time."""

    def __init__(self, source: Source, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel

        self._source, self._device = source, torch.device(device)
        with parameters_nowhere():
            self._model = AutoModel.from_config(source.model.config, dtype=torch.float32).eval()
        self._loaded: nn.Module | None = None

    def __len__(self) -> int:
        return self._source.model.layers

    @overload
    def __getitem__(self, i: int) -> nn.Module: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[nn.Module]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            raise TypeError("blocks are loaded one at a time; take them by number")
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self._loaded is not None:
            self._loaded.to("meta")
        block = self._model.layers[i]
        names = [name for name in block.state_dict() if not name.startswith("self_attn.")]
        weights = {name: self._source.read(f"model.layers.{i}.{name}").float().to(self._device) for name in names}
        block.load_state_dict(weights, assign=True, strict=False)
        self._loaded = block
        return block

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first layer for ids ``[W, T]``: ``[W, T, M]``."""
        embedding = self._model.embed_tokens
        weight = self._source.read("model.embed_tokens.weight")
        # Only the rows that occur: a vocabulary may be larger than all layers together.
        used, where = ids.unique(return_inverse=True)
        embedding.weight = nn.Parameter(weight[used].float().to(self._device), requires_grad=False)
        embedding.padding_idx = None
        return embedding(where.to(self._device))

    @torch.no_grad()
    def logits(self, stream: Tensor) -> Iterator[Tensor]:
        """Logits ``[1, T, vocabulary]`` of every window of ``stream [W, T, M]``, what leaves the last layer."""
        name = "model.embed_tokens.weight" if self._source.model.tied else "lm_head.weight"
        head = self._source.read(name).float().to(self._device)
        norm = self._model.norm
        weights = {"weight": self._source.read("model.norm.weight").float().to(self._device)}
        norm.load_state_dict(weights, assign=True)
        for window in stream.split(1):
            yield nn.functional.linear(norm(window), head)


class Layers(OneByOne[GQALayer]):
    """Attention of the original, float32, read when asked for."""

    def __init__(self, source: Source, device: str | torch.device = "cpu") -> None:
        def widen(value: Any) -> Any:
            return value.float().to(device) if isinstance(value, Tensor) else value

        def read(i: int) -> GQALayer:
            return GQALayer(**{name: widen(value) for name, value in vars(source.layer(i)).items()})

        super().__init__(source.model.layers, read)


def load_float32(source: Source) -> Any:
    """The original in float32, from weights that may lie in a bare file, without a configuration beside it."""
    from transformers import AutoModelForCausalLM

    with parameters_nowhere():
        model = AutoModelForCausalLM.from_config(source.model.config, dtype=torch.float32)
    weights = {name: source.read(name).float() for name in source.model.tensors()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


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
