"""Distillation by the clock: a student follows its teacher's predictions until its time is up.

Time is what the user gives, so time is what the schedule runs on; with a number of steps instead, the same seed gives
the same weights. The weights that did best on validation windows are kept, and a run that was interrupted goes on from
its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mlacompile.convert.divergence import head_divergence
from mlacompile.errors import UnsupportedInputError

#: token ids ``[B, T]`` to what the head reads, ``[B, T, M]``
Predict = Callable[[Tensor], Tensor]
#: Gradients of tensors whose weights are large are small, so what guards against dividing by 0 is smaller still.
_ADAM: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-12}
#: A look that is worse by more than this is no accident of which batch came last.
_WORSE = 1.02
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """Where a distillation stands. Divergences are in nats a token, on validation windows: at first, now, at best."""

    step: int = 0
    seconds: float = 0.0
    limit: float = 0.0  #: seconds there are to learn in; what preparing took is not among them
    caution: float = 1.0  #: what the rate is multiplied by
    first: float = math.inf
    divergence: float = math.inf
    best: float = math.inf

    def to_json(self) -> dict[str, Any]:
        seconds = {"seconds": round(self.seconds, 1)} if self.limit else {}
        return {"steps": self.step, **seconds, "kl": {"before": self.first, "best": self.best}}


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
            tensors |= {f"{key}.{name}": moments[key] for key in _MOMENTS}
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
                on = {"step": weight.device if optimizer.defaults["fused"] else torch.device("cpu")}
                optimizer.state[weight] = {
                    key: file.get_tensor(f"{key}.{name}").to(on.get(key, weight.device)) for key in _MOMENTS
                }
            return Progress(**json.loads(file.metadata()["state"]))


def distill(
    student: nn.Module,
    teacher: Predict,
    head: Tensor,
    texts: Sequence[Tensor],
    validation: Tensor,
    *,
    length: int,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int = 8,
    rate: float = 5e-4,
    warmup: float = 0.03,
    look_every: float = 0.05,
    checkpoint: Path | None = None,
    seed: int = 0,
    since: float | None = None,
    report: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Train what requires gradients in ``student`` for ``minutes`` or ``steps``; leaves the best weights in place.

    ``student`` and ``teacher`` turn ids ``[B, T]`` into what ``head [vocabulary, M]`` reads, ``[B, T, M]``; the loss is
    KL(teacher ‖ student) a token. A step reads ``batch`` windows of ``length``, from anywhere in ``texts`` (each
    ``[N]``, taking turns). ``rate`` is how far a step moves a weight, as a share of the root mean square of its tensor:
    tensors of a latent layer differ in size by a thousand. It rises for ``warmup`` of the way, then falls to zero as a
    cosine. Every ``look_every`` of it ``validation [V, T]`` is measured and ``checkpoint`` written; if it exists,
    training goes on from it. Where a look finds things clearly worse than they were, the best weights come back, and
    the rate is half of what it would be from there on. The minutes begin at ``since`` on the ``clock``, so that
    preparing can be part of them.

    Works wherever the weights are; on CUDA both compute in bfloat16, weights stay as they are.

    Raises UnsupportedInputError if nothing is trainable, or no text is as long as a window.
    """
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    if not named:
        raise UnsupportedInputError(
            "got a student without trainable parameters; expected its latent layers to require gradients"
        )
    weights = [p for _, p in named]
    device = weights[0].device
    texts = [text.to(device) for text in texts if len(text) >= length]
    if not texts:
        raise UnsupportedInputError(f"got no text of {length} tokens; expected at least one to learn from")
    began = clock() if since is None else since
    sizes = [p.detach().square().mean().sqrt().clamp_min(1e-8) for p in weights]
    groups = [{"params": [p], "size": size} for p, size in zip(weights, torch.stack(sizes).tolist())]
    optimizer = torch.optim.Adam(groups, lr=rate, fused=device.type == "cuda", **_ADAM)
    best = [p.detach().clone() for p in weights]
    state, saved = Progress(), None
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, (name for name, _ in named))
        if checkpoint.exists():
            state = saved.load(weights, best, optimizer)
    wanted = _whole(teacher, validation, device)

    def look() -> None:
        state.divergence = _validate(student, wanted, head, validation)
        state.first = state.divergence if math.isinf(state.first) else state.first
        if state.divergence < state.best:
            state.best = state.divergence
            for kept, weight in zip(best, weights):
                kept.copy_(weight.detach())
        elif not state.divergence <= _WORSE * state.best:  # or it is not a number
            state.caution /= 2
            for kept, weight in zip(best, weights):
                weight.data.copy_(kept)
                for moment in optimizer.state[weight].values():
                    moment.zero_()
        if saved is not None and state.step:
            saved.save(weights, best, optimizer, state)
        if report is not None:
            report(state)

    def learn(ids: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                true = teacher(ids)
            head_divergence(student(ids), true, head).backward()  # type: ignore[no-untyped-call]

    with _fast_products(device):
        if not state.step:
            look()
        if device.type == "cuda":  # What compiles at the first call is no time to learn in.
            learn(_draw(texts, batch, length, seed=-1))
            optimizer.zero_grad(set_to_none=True)
        if not state.limit and minutes is not None:
            state.limit = max(60 * minutes - (clock() - began), 0.1)
        began = clock() - state.seconds
        looked = int(_way(state, steps) / look_every)
        while (done := _way(state, steps)) < 1:
            rising = done / warmup if done < warmup else 1.0
            now = (
                rate * state.caution * rising * (0.5 + 0.5 * math.cos(math.pi * max(0.0, done - warmup) / (1 - warmup)))
            )
            for group in optimizer.param_groups:
                group["lr"] = now * group["size"]
            learn(_draw(texts, batch, length, seed=seed * 1_000_003 + state.step))
            _bound(weights, sizes)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            if steps is None:
                state.seconds = clock() - began
            if int(_way(state, steps) / look_every) > looked:
                looked = int(_way(state, steps) / look_every)
                look()
        if state.step and looked < int(1 / look_every):
            look()
    with torch.no_grad():
        for kept, weight in zip(best, weights):
            weight.copy_(kept)
    return state


def _way(state: Progress, steps: int | None) -> float:
    """Share of the way that lies behind."""
    return state.step / steps if steps is not None else state.seconds / state.limit


def _draw(texts: Sequence[Tensor], batch: int, length: int, *, seed: int) -> Tensor:
    """``[batch, length]`` from anywhere in ``texts``, which take turns; ``seed`` says where."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row, place in enumerate(torch.rand(batch, generator=generator).tolist()):
        text = texts[(row + seed) % len(texts)]
        first = int(place * (len(text) - length + 1))
        rows.append(text[first : first + length])
    return torch.stack(rows)


def _bound(weights: Sequence[nn.Parameter], sizes: Sequence[Tensor], limit: float = 1.0) -> None:
    """Scale gradients down to a norm of ``limit``, each being counted as by the share that its tensor changes."""
    grads = [p.grad for p in weights if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    total = (norms * torch.stack([size for p, size in zip(weights, sizes) if p.grad is not None])).norm()
    torch._foreach_mul_(grads, (limit / (total + 1e-12)).clamp_max(1.0))


@torch.no_grad()
def _whole(predict: Predict, windows: Tensor, device: torch.device) -> Tensor:
    """What ``predict`` says of windows ``[V, T]``, one at a time, in full precision and not compiled."""
    with torch.compiler.set_stance("force_eager"), _fast_products(device):
        return torch.cat([predict(one.to(device)) for one in windows.split(1)])


def _validate(student: nn.Module, wanted: Tensor, head: Tensor, windows: Tensor) -> float:
    said = _whole(student, windows, wanted.device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        # The last token of a window has nothing to predict.
        return head_divergence(said[:, :-1], wanted[:, :-1], head).item()


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """Products of float32 on a GPU's tensor cores, which round what they read to ten bits; elsewhere as ever."""
    kept = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)
