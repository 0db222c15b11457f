"""The model to convert: its configuration and its weights agree, or it is said where they do not; layers one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlacompile.checkpoint import CheckpointReader
from mlacompile.convert.families import GQAModel, describe, read_config
from mlacompile.convert.form import GQALayer
from mlacompile.convert.infer import infer_config
from mlacompile.errors import CheckpointError, UnsupportedInputError

#: Buffers that old checkpoints carry and that the configuration makes again.
_BUFFERS = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Source:
    """``model`` says what it is, ``weights`` holds it; ``prefix`` is what its tensor names lack of Llama's."""

    path: Path
    model: GQAModel
    weights: CheckpointReader
    dtype: torch.dtype
    prefix: str = ""

    def read(self, name: str) -> Tensor:
        """A tensor by Llama's name for it."""
        return self.weights.read(name.removeprefix(self.prefix))

    def layer(self, i: int) -> GQALayer:
        """Attention of layer ``i``, in the stored dtype."""
        model, at = self.model, f"model.layers.{i}.self_attn."
        h, g, d = model.heads, model.groups, model.head_dim

        def bias(name: str, *shape: int) -> Tensor | None:
            return self.read(f"{at}{name}_proj.bias").reshape(shape) if name in model.biases else None

        return GQALayer(
            w_q=self.read(at + "q_proj.weight").reshape(h, d, model.hidden),
            w_k=self.read(at + "k_proj.weight").reshape(g, d, model.hidden),
            w_v=self.read(at + "v_proj.weight").reshape(g, d, model.hidden),
            w_o=self.read(at + "o_proj.weight").reshape(model.hidden, h, d),
            b_q=bias("q", h, d),
            b_k=bias("k", g, d),
            b_v=bias("v", g, d),
            b_o=bias("o", model.hidden),
            inv_freq=model.inv_freq,
            scale=model.scale,
        )

    def attention(self) -> Iterator[GQALayer]:
        """All attention layers, one at a time."""
        return (self.layer(i) for i in range(self.model.layers))


def open_source(
    path: str | Path,
    *,
    config: str | Path | None = None,
    head_dim: int | None = None,
    rope_theta: float | None = None,
) -> Source:
    """Open a folder in Hugging Face's layout, or a ``.safetensors`` file; reads headers only.

    Args:
        path: the folder or the file.
        config: a config.json for a file without one. Without it, the configuration is concluded from the shapes, and
            ``source.model.assumed`` says what was concluded.
        head_dim: the width of a head, where nothing says it.
        rope_theta: the rotary base, where nothing says it.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the configuration says, or would be lost.
        UnsupportedInputError: the model does not convert; see ``families.describe``.
    """
    path = Path(path)
    found = config if config is not None else (path if path.is_dir() else path.parent) / "config.json"
    if Path(found).exists() or config is not None:
        model = describe(read_config(Path(found)))  # an unknown model is refused for what it is, not for its names
        weights = CheckpointReader(path)
        prefix = _prefix(weights)
    else:
        weights = CheckpointReader(path)
        prefix = _prefix(weights)
        shapes = {prefix + name: stored.spec.shape for name, stored in weights.tensors.items()}
        inferred = infer_config(shapes, head_dim=head_dim, rope_theta=rope_theta)
        model = describe(inferred.raw, tuple(inferred.said))
    source = Source(path, model, weights, _check(model, weights, prefix), prefix)
    _refuse_two_heads(source)
    return source


def _prefix(weights: CheckpointReader) -> str:
    """Bare models (``LlamaModel``) are stored without the ``model.`` that the causal language model puts in front."""
    return "" if any(name.startswith("model.") for name in weights.tensors) else "model."


def _check(model: GQAModel, weights: CheckpointReader, prefix: str) -> torch.dtype:
    wanted = model.tensors()
    for name, shape in wanted.items():
        spec = weights.spec(name.removeprefix(prefix))
        file = weights.tensors[spec.name].file
        if spec.shape != shape:
            raise CheckpointError(
                f"{file}: tensor {spec.name!r} has shape {list(spec.shape)}; the configuration says {list(shape)}"
            )
        if spec.dtype not in _FLOATS:
            raise CheckpointError(
                f"{file}: tensor {spec.name!r} has dtype {spec.dtype}; expected one of {', '.join(map(str, _FLOATS))}: "
                "dequantize the model first"
            )
    allowed = {name.removeprefix(prefix) for name in wanted} | {"lm_head.weight"}
    for name, stored in weights.tensors.items():
        if name not in allowed and not name.endswith(_BUFFERS):
            raise CheckpointError(
                f"{stored.file}: tensor {name!r} belongs to no {model.family} model with this configuration, and would "
                "be lost"
            )
    dtypes = [weights.spec(name.removeprefix(prefix)).dtype for name in wanted if name.endswith("proj.weight")]
    return max(set(dtypes), key=dtypes.count)


def _refuse_two_heads(source: Source) -> None:
    """An output projection that is stored although the configuration ties it has to be the embedding."""
    if source.model.tied and "lm_head.weight" in source.weights:
        head = source.weights.read("lm_head.weight")
        if not torch.equal(head, source.read("model.embed_tokens.weight")):
            raise UnsupportedInputError(
                f"{source.weights.tensors['lm_head.weight'].file}: tensor 'lm_head.weight' differs from the embedding, "
                "but the configuration says tie_word_embeddings; set it to false, or remove the tensor"
            )
