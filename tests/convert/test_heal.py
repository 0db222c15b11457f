"""Healing: errors fall, the best weights stay, and an interrupted run goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mlacompile.convert.attend import gqa_attention, mla_attention
from mlacompile.convert.heal import distill, fit_layer
from mlacompile.convert.transmla import transmla
from mlacompile.errors import UnsupportedInputError
from tests.convert.layers import random_input, random_layer


def test_a_layer_comes_nearer_to_its_target() -> None:
    layer, x = random_layer(), random_input()
    flat = x.flatten(0, 1).double()
    latent = transmla(layer, flat.T @ flat / len(flat), rope_dim=8, rank=4)
    target, kept = gqa_attention(layer, x), latent.w_dkv.clone()
    healed = fit_layer(latent, x, target, steps=60, rate=3e-3)
    before, after = ((mla_attention(form, x) - target).square().mean() for form in (latent, healed))
    assert after < 0.8 * before
    assert not healed.w_q.requires_grad
    assert torch.equal(latent.w_dkv, kept)  # the layer that was given is not touched
    assert torch.equal(healed.inv_freq, latent.inv_freq)


def _bigram(seed: int) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(12, 12)


def _ticking() -> Callable[[], float]:
    ticks = iter(range(1_000_000))
    return lambda: float(next(ticks))


def _train(student: nn.Module, teacher: nn.Module, **more: object) -> float:
    windows = torch.randint(0, 12, (6, 9), generator=torch.Generator().manual_seed(3))
    done = distill(
        student,
        student,
        teacher,
        windows,
        windows,
        rate=0.05,
        batch=4,
        clock=_ticking(),
        **more,  # type: ignore[arg-type]
    )
    return done.best


def test_the_student_learns_what_the_teacher_says() -> None:
    student, teacher = _bigram(0), _bigram(1)
    looks: list[float] = []
    best = _train(student, teacher, minutes=3.0, report=lambda state: looks.append(state.divergence))
    assert best < 0.1 * looks[0]


def test_too_high_a_rate_leaves_the_weights_that_were_best() -> None:
    student, teacher = _bigram(0), _bigram(0)

    def predict(ids: Tensor) -> Tensor:
        return student(ids)

    with torch.no_grad():
        student.weight[0] += 1e-4
    before = student.weight.detach().clone()
    windows = torch.randint(0, 12, (6, 9))
    distill(student, predict, teacher, windows, windows, minutes=0.2, rate=50.0, warmup=0.01, clock=_ticking())
    assert torch.equal(student.weight, before)


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole, parts, teacher = _bigram(0), _bigram(0), _bigram(1)
    straight = _train(whole, teacher, minutes=1.0)

    class Killed(Exception):
        pass

    def kill(state: object) -> None:
        if state.seconds > 30:  # type: ignore[attr-defined]
            raise Killed

    with pytest.raises(Killed):
        _train(parts, teacher, minutes=1.0, checkpoint=tmp_path / "heal", report=kill)
    fresh = _bigram(5)  # nothing survives but the file
    resumed = _train(fresh, teacher, minutes=1.0, checkpoint=tmp_path / "heal")
    assert abs(resumed - straight) < 0.1 * straight + 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["heal"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _train(_bigram(0), _bigram(1), minutes=0.2, checkpoint=tmp_path / "heal")
    with pytest.raises(UnsupportedInputError, match="of other weights"):
        _train(nn.Sequential(_bigram(0)), _bigram(1), minutes=0.2, checkpoint=tmp_path / "heal")


def test_nothing_to_train_is_an_error() -> None:
    student = _bigram(0).requires_grad_(False)
    with pytest.raises(UnsupportedInputError, match="without trainable parameters"):
        _train(student, _bigram(1), minutes=0.1)
