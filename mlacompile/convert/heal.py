"""Healing by gradient: the original teaches the compressed model, a few minutes long.

Both models are one, but for attention: embedding, MLPs, norms and head are shared and stay as they are. The student is
trained by the divergence of its predictions from the teacher's (distill.py), on the calibration text and on what the
teacher writes when it is given the beginnings of it.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlacompile.convert.attend import GroupedAttention, LatentAttention
from mlacompile.convert.distill import Progress, distill
from mlacompile.convert.form import MLALayer
from mlacompile.convert.source import Source
from mlacompile.convert.stream import Layers, load_float32

#: What the original writes when a text is short: beginnings that are given, passages with them, passages at once.
_PROMPT, _PASSAGE, _WRITTEN_AT_ONCE = 32, 256, 8192


def detached(module: LatentAttention) -> MLALayer:
    """The module's weights as plain tensors."""
    values: dict[str, Any] = {n: None if p is None else p.detach().clone() for n, p in module._parameters.items()}
    return replace(module.layer, **values)


def write_text(model: nn.Module, prompts: Tensor, *, length: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """Windows ``[W, length]`` that ``model`` (with Hugging Face's ``generate``) writes after ``prompts [W, S]``.

    For learning from when the calibration text is short: what the original would say is what the converted one should.
    On CUDA it is written in bfloat16.
    """
    device = prompts.device
    with (
        torch.random.fork_rng(devices=[device] if prompts.is_cuda else []),
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=prompts.is_cuda),
    ):
        torch.manual_seed(seed)
        written = model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - prompts.shape[1],
            max_new_tokens=length - prompts.shape[1],
        )
    return written.clone()


class Stream(nn.Module):
    """A Hugging Face model up to its head, with attention of our own: no cache, no mask, positions from 0."""

    def __init__(self, model: Any, attention: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm = model.embed_tokens, model.norm
        self.blocks = nn.ModuleList()
        for block, own in zip(model.layers, attention):
            mine = copy.copy(block)
            mine._modules = dict(block._modules)
            mine.self_attn = own
            self.blocks.append(mine)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to what the head reads, ``[B, T, M]``."""
        stream = self.embed(ids)
        if torch.is_grad_enabled():  # Nobody wants it, but so the first block is compiled like all others.
            stream.requires_grad_()
        for block in self.blocks:
            out = block(stream, position_embeddings=None)
            stream = out if isinstance(out, Tensor) else out[0]
        out = self.norm(stream)
        assert isinstance(out, Tensor)
        return out

    def compile_blocks(self) -> None:
        """Blocks are alike, so what is compiled for one serves all."""
        for block in self.blocks:
            block.compile(dynamic=False)


def heal_model(
    source: Source,
    layers: Sequence[MLALayer],
    text: Tensor,
    validation: Tensor,
    *,
    length: int,
    folder: Path,
    device: str | torch.device = "cpu",
    seed: int = 0,
    written: int = 0,
    **how: Any,
) -> tuple[list[MLALayer], Progress]:
    """``layers`` after a distillation with the original as the teacher; only attention is trained.

    ``text [N]`` is learnt from in windows of ``length``, ``validation [V, T]`` says which weights were best.
    ``written`` tokens more are written by the original itself. What is needed to go on after an interruption is in
    ``folder``. ``how`` goes to ``distill``, with ``minutes`` or ``steps``.
    """
    device, began = torch.device(device), time.monotonic()
    model = load_float32(source).to(device)
    texts = [text]
    if written:
        texts.append(_own_text(model, text, folder / "written.safetensors", tokens=written, seed=seed))
    originals = Layers(source, device)
    longest = max(length, validation.shape[1])
    teacher = Stream(model.model, [GroupedAttention(layer, longest) for layer in originals])
    own = (layer.map(lambda value: value.clone().to(device)) for layer in layers)
    student = Stream(model.model, [LatentAttention(layer, longest) for layer in own])
    if device.type == "cuda":
        teacher.compile_blocks()
        student.compile_blocks()
    state = distill(
        student,
        teacher,
        model.lm_head.weight.detach(),
        texts,
        validation,
        length=length,
        checkpoint=folder / "healing.safetensors",
        seed=seed,
        since=began,
        **how,
    )
    return [detached(block.self_attn).map(Tensor.cpu) for block in student.blocks], state  # type: ignore[arg-type]


def _own_text(model: Any, text: Tensor, file: Path, *, tokens: int, seed: int) -> Tensor:
    """``[tokens]``, up to a passage, that ``model`` wrote after beginnings from all over ``text``; kept in ``file``."""
    if not file.exists():
        first = torch.linspace(0, len(text) - _PROMPT, max(1, tokens // _PASSAGE)).long()
        prompts = text[first[:, None] + torch.arange(_PROMPT)].to(model.device)
        parts = enumerate(prompts.split(_WRITTEN_AT_ONCE))
        own = torch.cat([write_text(model, part, length=_PASSAGE, seed=seed + n) for n, part in parts])
        unnamed = file.with_suffix(".tmp")
        save_file({"ids": own.flatten().cpu()}, unnamed)
        os.replace(unnamed, file)
    return load_file(file)["ids"]
