"""Which weights of a model belong in FP8: those of its linear layers and experts, but for its head and its routers.

Asked of the architecture itself, for a checkpoint built without memory, because names do not tell a linear layer from a
table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlacompile.errors import UnsupportedInputError

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.[^.]+$")
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


class Modules:
    """The modules of the model that ``folder`` holds.

    Raises:
        UnsupportedInputError: transformers is missing, or cannot build the model.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise UnsupportedInputError(
                "reading a model's layers needs transformers: pip install transformers"
            ) from error
        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            with torch.device("meta"):
                self._model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        except Exception as error:
            # transformers raises everything from KeyError to its own validation errors here.
            raise UnsupportedInputError(f"{folder}: transformers cannot build this model: {error}") from error
        self._read()

    @classmethod
    def of(cls, model: nn.Module) -> Modules:
        """Those of a model in memory, of transformers or not."""
        modules = cls.__new__(cls)
        modules._model = model
        modules._read()
        return modules

    def _read(self) -> None:
        self._linears = {name for name, module in self._model.named_modules() if type(module) is nn.Linear}
        self._known = {name for name, _ in self._model.named_modules()}
        config: Any = getattr(self._model, "config", None)
        routers = self._routers(config.get_text_config(decoder=True)) if hasattr(config, "get_text_config") else set()
        self.kept = self._head() | routers

    def wants_fp8(self, tensor: str) -> bool:
        """Whether the weight of this name is one that transformers reads in FP8, and that bears it."""
        path = tensor.removesuffix(".weight")
        if path == tensor or path in self.kept:
            return False
        return path in self._linears or self._experts_of(tensor) is not None

    def not_in(self, chosen: Collection[str], tensors: Iterable[str]) -> set[str]:
        """Paths of the layers whose weights are not ``chosen``: linear layers, and experts as a whole.

        Raises:
            UnsupportedInputError: some weights of one layer's experts are chosen and others are not; transformers
                keeps them in one tensor.
        """
        kept = {path for path in self._linears if f"{path}.weight" not in chosen}
        for tensor in tensors:
            experts = self._experts_of(tensor) if tensor not in chosen else None
            if experts is not None:
                kept.add(experts)
        for tensor in chosen:
            if self._experts_of(tensor) in kept:
                raise UnsupportedInputError(
                    f"{tensor!r} would be in FP8 and other weights of these experts would not: keep all of them "
                    "('*.experts.*') or none (those that 128 × 128 does not divide need partial_blocks)"
                )
        return kept

    def _experts_of(self, tensor: str) -> str | None:
        found = _EXPERT.match(tensor.removesuffix(".weight"))
        return found["experts"] if found is not None and found["experts"] in self._known else None

    def _head(self) -> set[str]:
        head = self._model.get_output_embeddings() if hasattr(self._model, "get_output_embeddings") else None
        return {name for name, module in self._model.named_modules() if head is not None and module is head}

    def _routers(self, config: Any) -> set[str]:
        """Linear layers with an output for every expert, beside or below experts."""
        found = [getattr(config, name, None) for name in _EXPERT_COUNTS]
        extra = getattr(config, "zero_expert_num", None) or 0
        counts = {count + more for count in found if isinstance(count, int) for more in (0, extra)}
        return {name for name in self._linears if self._model.get_submodule(name).out_features in counts}
