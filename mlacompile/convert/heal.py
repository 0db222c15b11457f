"""Healing by gradient: the original teaches the compressed model, a few minutes long.

First each layer alone, on the original's own inputs and outputs; then the whole model, by the divergence of its
predictions from the original's. Time is what the user gives, so time is what the schedule runs on. The weights that did
best on validation windows are kept, and a run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mlacompile.convert.attend import LatentAttention
from mlacompile.convert.evaluate import Predict, measure
from mlacompile.convert.form import MLALayer
from mlacompile.convert.source import Source
from mlacompile.convert.stream import load_float32
from mlacompile.errors import UnsupportedInputError

#: Tokens of a text that the original goes on from when it writes more, and how many windows at once.
_PROMPT, _WRITTEN_AT_ONCE = 8, 128


def fit_layer(
    layer: MLALayer, x: Tensor, target: Tensor, *, steps: int, batch: int = 4, rate: float = 1e-3, seed: int = 0
) -> MLALayer:
    """``layer`` after ``steps`` of Adam towards ``target [W, T, M]``, the output wanted for windows ``x [W, T, M]``."""
    generator = torch.Generator().manual_seed(seed)
    module = copy.deepcopy(
        LatentAttention(layer)
    ).float()  # a parameter shares its memory with the tensor it was made of
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, betas=(0.9, 0.95))
    scale = target.float().square().mean()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        chosen = torch.randint(len(x), (min(batch, len(x)),), generator=generator).to(x.device)
        loss = F.mse_loss(module(x[chosen].float())[0], target[chosen].float()) / scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return detached(module)


def detached(module: LatentAttention) -> MLALayer:
    """The module's weights as plain tensors."""
    values: dict[str, Any] = {n: None if p is None else p.detach().clone() for n, p in module._parameters.items()}
    return replace(module.layer, **values)


@dataclass
class Progress:
    """Where a distillation stands. Divergences are in nats a token, on validation windows: at first, now, at best."""

    step: int = 0
    seconds: float = 0.0
    first: float = math.inf
    divergence: float = math.inf
    best: float = math.inf

    def to_json(self) -> dict[str, Any]:
        return {"steps": self.step, "seconds": self.seconds, "kl": {"before": self.first, "best": self.best}}


def write_text(model: nn.Module, prompts: Tensor, *, length: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """Windows ``[W, length]`` that ``model`` (with Hugging Face's ``generate``) writes after ``prompts [W, S]``.

    For learning from when the calibration text is short: what the original would say is what the converted one should.
    """
    devices = [prompts.device] if prompts.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
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


class Checkpoint:
    """Trainable weights, the best so far, Adam's moments and Progress, in one safetensors file, replaced atomically."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self.names = list(names)

    def save(
        self, weights: list[nn.Parameter], best: list[Tensor], optimizer: torch.optim.Adam, state: Progress
    ) -> None:
        tensors: dict[str, Tensor] = {}
        for name, weight, kept in zip(self.names, weights, best):
            moments = optimizer.state[weight]
            tensors |= {f"weight.{name}": weight.detach(), f"best.{name}": kept}
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq", "step")}
        partial = self.path.with_name(self.path.name + ".part")
        save_file(
            {name: t.contiguous().cpu() for name, t in tensors.items()}, partial, {"state": json.dumps(asdict(state))}
        )
        os.replace(partial, self.path)

    def load(self, weights: list[nn.Parameter], best: list[Tensor], optimizer: torch.optim.Adam) -> Progress:
        """Raises UnsupportedInputError if the file is of another model."""
        with safe_open(self.path, framework="pt") as file:
            expected = {f"weight.{name}" for name in self.names}
            got = {key for key in file.keys() if key.startswith("weight.")}  # noqa: SIM118 (not a mapping)
            if expected != got:
                raise UnsupportedInputError(
                    f"got a checkpoint {self.path} of other weights ({len(expected ^ got)} names differ); "
                    "expected one of this very model: remove the file to start anew"
                )
            for name, weight, kept in zip(self.names, weights, best):
                weight.data.copy_(file.get_tensor(f"weight.{name}"))
                kept.copy_(file.get_tensor(f"best.{name}"))
                optimizer.state[weight] = {
                    key: file.get_tensor(f"{key}.{name}").to("cpu" if key == "step" else weight.device)
                    for key in ("exp_avg", "exp_avg_sq", "step")
                }
            return Progress(**json.loads(file.metadata()["state"]))


def distill(
    student: nn.Module,
    predict: Predict,
    teacher: Predict,
    windows: Tensor,
    validation: Tensor,
    *,
    minutes: float,
    rate: float = 3e-4,
    batch: int = 8,
    warmup: float = 0.03,
    look_every: float = 0.1,
    checkpoint: Path | None = None,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Train what requires gradients in ``student`` until ``minutes`` have passed; leaves the best weights in place.

    ``predict`` and ``teacher`` turn ids ``[B, T]`` into logits; the loss is KL(teacher ‖ student) a token on
    ``windows [W, T]``. The rate rises for ``warmup`` of the time, then falls to zero as a cosine. Every ``look_every``
    of the time ``validation [V, T]`` is measured and ``checkpoint`` written; if it exists, training goes on from it.
    Works wherever the weights are; on CUDA the student computes in bfloat16, its weights stay as they are.

    Raises UnsupportedInputError if nothing is trainable.
    """
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    if not named:
        raise UnsupportedInputError(
            "got a student without trainable parameters; expected its latent layers to require gradients"
        )
    weights = [p for _, p in named]
    device = weights[0].device
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.95))
    best = [p.detach().clone() for p in weights]
    state, saved = Progress(), None
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, (name for name, _ in named))
        if checkpoint.exists():
            state = saved.load(weights, best, optimizer)

    def look() -> None:
        score = measure(predict, validation, original=teacher)
        assert score.divergence is not None
        state.divergence = score.divergence
        state.first = score.divergence if math.isinf(state.first) else state.first
        if score.divergence < state.best:
            state.best = score.divergence
            for kept, weight in zip(best, weights):
                kept.copy_(weight.detach())
        if saved is not None and state.step:
            saved.save(weights, best, optimizer, state)
        if report is not None:
            report(state)

    limit, began = minutes * 60, clock() - state.seconds
    if not state.step:
        look()
    looked = int(state.seconds / limit / look_every)
    while state.seconds < limit:
        done = state.seconds / limit
        now = rate * (
            done / warmup if done < warmup else 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))
        )
        for group in optimizer.param_groups:
            group["lr"] = now
        generator = torch.Generator().manual_seed(seed * 1_000_003 + state.step)
        ids = windows[torch.randint(len(windows), (batch,), generator=generator)].to(device)
        with torch.inference_mode():
            true = teacher(ids).float().log_softmax(-1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = predict(ids)
        loss = F.kl_div(logits.float().log_softmax(-1), true.clone(), log_target=True, reduction="sum") / ids.numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        state.step += 1
        state.seconds = clock() - began
        if int(state.seconds / limit / look_every) > looked:
            looked = int(state.seconds / limit / look_every)
            look()
    look()
    with torch.no_grad():
        for kept, weight in zip(best, weights):
            weight.copy_(kept)
    return state


def heal_model(
    source: Source,
    layers: Sequence[MLALayer],
    windows: Tensor,
    validation: Tensor,
    *,
    minutes: float,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    seed: int = 0,
    written: int = 0,
    report: Callable[[Progress], None] | None = None,
    **how: Any,
) -> tuple[list[MLALayer], Progress]:
    """``layers`` after a distillation of ``minutes``, the original being the teacher; only attention is trained.

    Both models are in memory, with one copy of all that is around attention. ``windows [W, T]`` are learnt from,
    ``validation [V, T]`` says which weights were best. ``written`` windows more are written by the original itself.
    ``how`` goes to ``distill``.
    """
    device = torch.device(device)
    teacher, student = load_float32(source), load_float32(source)
    teacher.to(device)
    for mine, theirs in zip(student.model.layers, teacher.model.layers):
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(mine, name, getattr(theirs, name))
    student.model.embed_tokens, student.model.norm = teacher.model.embed_tokens, teacher.model.norm
    student.lm_head = teacher.lm_head
    student.model.rotary_emb = teacher.model.rotary_emb
    for block, layer in zip(student.model.layers, layers):
        block.self_attn = LatentAttention(layer.map(lambda value: value.clone().to(device)))
    if written:
        prompts = windows[torch.arange(written) % len(windows), :_PROMPT].to(device)
        own = [
            write_text(teacher, part, length=windows.shape[1], seed=seed + n)
            for n, part in enumerate(prompts.split(_WRITTEN_AT_ONCE))
        ]
        windows = torch.cat((windows, *(part.to(windows.device) for part in own)))

    def predict(model: Any) -> Predict:
        def run(ids: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
            return logits

        return run

    state = distill(
        student,
        predict(student),
        predict(teacher),
        windows,
        validation,
        minutes=minutes,
        checkpoint=checkpoint,
        seed=seed,
        report=report,
        **how,
    )
    return [detached(block.self_attn).map(Tensor.cpu) for block in student.model.layers], state
