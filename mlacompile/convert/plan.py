"""What will be written: the class of the result, every tensor of it before any exists, and how each is made.

Shapes come from running the same code on meta tensors, so that there is no second set of formulas for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mlacompile.checkpoint import TensorSpec
from mlacompile.convert import own, stock
from mlacompile.convert.families import GQAModel
from mlacompile.convert.form import GQALayer, MLALayer, OneByOne
from mlacompile.convert.lift import interleaved, lift
from mlacompile.convert.source import Source
from mlacompile.errors import UnsupportedInputError

TARGETS = ("transformers", "vllm")
_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.(.+)")
_HEAD_NORMS = ("q_norm.weight", "k_norm.weight")


@dataclass
class Plan:
    """A conversion that is decided and not yet done.

    ``shapes`` are the layers of the result as meta tensors; ``make`` gives one with its values, by its number.
    """

    source: Source
    dtype: torch.dtype
    target: str
    shapes: list[MLALayer]
    make: Callable[[int], MLALayer]
    needs_own_class: list[str]
    _made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> GQAModel:
        return self.source.model

    @property
    def biases(self) -> stock.Biases:
        return stock.Biases.of(self.shapes)

    @property
    def engine(self) -> bool:
        return self.target == "vllm"

    def specs(self) -> list[TensorSpec]:
        """Every tensor of the result, in the order in which they are written: layer by layer."""
        found: list[TensorSpec] = []
        for name, shape in self.model.tensors().items():
            match = _ATTENTION.fullmatch(name)
            if match is None or match[2] in _HEAD_NORMS:
                found.append(TensorSpec(name, self.dtype, shape))
            elif match[2] == "q_proj.weight":
                made = self._attention(int(match[1]), self.shapes[int(match[1])], meta_layer(self.model, self.dtype))
                found += [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in made.items()]
        return found

    def produce(self, spec: TensorSpec) -> Tensor:
        """The tensor of a spec. The attention of a layer is made when its first tensor is asked for."""
        match = _ATTENTION.fullmatch(spec.name)
        if match is None or match[2] in _HEAD_NORMS:
            return self._around(spec.name)
        if spec.name not in self._made:
            i = int(match[1])
            self._made = self._attention(i, self.make(i), self.source.layer(i) if self.model.qk_norm else None)
        return self._made.pop(spec.name)

    def config(self) -> dict[str, Any]:
        if self.needs_own_class:
            return own.config(self.model, self.shapes, self.dtype)
        return stock.config(self.model, self.shapes[0], self.dtype, self.biases, engine=self.engine)

    def _attention(self, i: int, layer: MLALayer, source: GQALayer | None) -> dict[str, Tensor]:
        if self.engine:
            layer = stock.fit_engine(layer)
            layer = replace(layer, w_o=layer.w_o * self._residual_scale)
        if self.needs_own_class:
            made = own.tensors(layer, source if self.model.qk_norm else None, self.dtype, self.biases)
        else:
            made = stock.tensors(layer, self.dtype, self.biases, scaled=self.engine)
        return {f"model.layers.{i}.self_attn.{name}": tensor for name, tensor in made.items()}

    @property
    def _residual_scale(self) -> float:
        """vLLM takes one epsilon for all norms. A residual stream scaled by this has the source's epsilon after all:
        RMSNorm(a·x, a²·eps) = RMSNorm(x, eps)."""
        return (stock.LATENT_EPS / self.model.config.rms_norm_eps) ** 0.5 if self.engine else 1.0

    def _around(self, name: str) -> Tensor:
        """A tensor outside attention, or a norm of heads: as it was, but for what attention or engine make of it."""
        tensor, scale = self.source.read(name), self._residual_scale
        if name.endswith(_HEAD_NORMS):
            tensor = tensor[interleaved(len(tensor))]
        if scale != 1.0:
            if name == "model.embed_tokens.weight" or name.endswith(("down_proj.weight", "down_proj.bias")):
                tensor = tensor.float() * scale
            elif name == "model.norm.weight" and self.model.tied:
                tensor = tensor.float() / scale
        return tensor.to(self.dtype)


def plan(
    source: Source,
    *,
    target: str = "transformers",
    dtype: torch.dtype | None = None,
    layers: Sequence[MLALayer] | None = None,
) -> Plan:
    """Decide how ``source`` is written.

    Args:
        source: the model.
        target: "transformers", or "vllm" for what that engine takes too.
        dtype: of the result; None keeps the source's where the class can hold it, else float32.
        layers: attention in latent form, asked for one at a time; None lifts the source's without loss.

    Raises:
        UnsupportedInputError: neither a stock class nor ours can hold the result, or the engine cannot.
    """
    model = source.model
    if target not in TARGETS:
        raise UnsupportedInputError(f"target {target!r}: expected one of {', '.join(TARGETS)}")
    if layers is None:
        # Layers of the source are alike, and so are their lifted shapes.
        shapes = [lift(meta_layer(model, source.dtype))] * model.layers
        make = lifted(source).__getitem__
    else:
        shapes = [to_meta(layers[i]) for i in range(model.layers)]
        make = layers.__getitem__
    lacks = list(model.stock_lacks) or stock.refusals(shapes)
    if lacks and target == "vllm":
        raise UnsupportedInputError(f"--target vllm: no class of it has {'; '.join(lacks)}; take --target transformers")
    if lacks and own.refusals(shapes):
        raise UnsupportedInputError(f"no class can hold this: {'; '.join(lacks + own.refusals(shapes))}")
    if dtype is None:
        narrow = source.dtype == torch.float16 and not lacks
        dtype = torch.float32 if narrow else source.dtype
    elif dtype == torch.float16 and not lacks:
        raise UnsupportedInputError(
            "float16 has too few exponents for a latent whose norm is to do nothing; take bfloat16 or float32"
        )
    decided = Plan(source, dtype, target, shapes, make, lacks)
    if decided.engine:
        decided.shapes = [stock.fit_engine(shape) for shape in shapes]
    return decided


def lifted(source: Source) -> Sequence[MLALayer]:
    """All attention of the source, lifted without loss when asked for."""
    return OneByOne(source.model.layers, lambda i: lift(source.layer(i)))


def meta_layer(model: GQAModel, dtype: torch.dtype) -> GQALayer:
    """A layer of the source without values."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    h, g, d, m = model.heads, model.groups, model.head_dim, model.hidden
    return GQALayer(
        w_q=empty(h, d, m),
        w_k=empty(g, d, m),
        w_v=empty(g, d, m),
        w_o=empty(m, h, d),
        b_q=empty(h, d) if "q" in model.biases else None,
        b_k=empty(g, d) if "k" in model.biases else None,
        b_v=empty(g, d) if "v" in model.biases else None,
        b_o=empty(m) if "o" in model.biases else None,
        inv_freq=model.inv_freq,
        scale=model.scale,
    )


def to_meta(layer: MLALayer) -> MLALayer:
    """The same layer without values, but for its rotary frequencies."""
    return replace(layer.map(lambda value: value.to("meta")), inv_freq=layer.inv_freq)
