"""Distillation: errors fall, the best weights stay, and an interrupted run goes on where it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlacompile.convert.distill import Progress, distill
from mlacompile.errors import UnsupportedInputError

_HEAD = torch.eye(12)
_TEXT = torch.randint(0, 12, (80,), generator=torch.Generator().manual_seed(3))


def _bigram(seed: int) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(12, 12)


def _ticking() -> Callable[[], float]:
    ticks = iter(range(1_000_000))
    return lambda: float(next(ticks))


def _train(student: nn.Module, teacher: nn.Module, **more: Any) -> Progress:
    how: dict[str, Any] = {"rate": 0.05, "batch": 4, "length": 9, "clock": _ticking()}
    return distill(student, teacher, _HEAD, [_TEXT], _TEXT[:54].view(6, 9), **how | more)


def test_the_student_learns_what_the_teacher_says() -> None:
    looks: list[float] = []
    done = _train(_bigram(0), _bigram(1), minutes=3.0, report=lambda state: looks.append(state.divergence))
    assert done.best < 0.1 * looks[0]
    assert done.first == looks[0]
    assert done.seconds >= done.limit > 170  # a tick a step, and a few to prepare


def test_the_minutes_are_those_since_preparing_began() -> None:
    assert _train(_bigram(0), _bigram(1), minutes=1.0, since=-30.0).step <= 30


@pytest.mark.parametrize("rate", [50.0, 1e30])
def test_too_high_a_rate_is_halved_and_leaves_the_weights_that_were_best(rate: float) -> None:
    student, teacher = _bigram(0), _bigram(0)
    with torch.no_grad():
        student.weight[0] += 1e-4
    before = student.weight.detach().clone()
    done = _train(student, teacher, steps=4, rate=rate, warmup=0.01, look_every=0.25)
    assert torch.equal(student.weight, before)
    assert done.best == done.first
    assert done.caution == 1 / 8  # the first of the four steps is none: the rate rises from zero


def test_a_step_moves_tensors_by_a_share_of_their_size() -> None:
    moved = []
    for size in (1.0, 1e-3):
        student = _bigram(0)
        with torch.no_grad():
            student.weight *= size
        before = student.weight.detach().clone()
        _train(student, _bigram(1), steps=10, rate=0.01)
        moved.append(((student.weight.detach() - before).norm() / before.norm()).item())
    assert abs(moved[0] / moved[1] - 1) < 0.3


class _Killed(Exception):
    pass


def test_killed_at_ten_random_steps_the_weights_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Not only at checkpoints: what was learnt since the last of them is learnt again."""
    teacher, straight = _bigram(1), _bigram(0)
    _train(straight, teacher, steps=60)
    choose = random.Random(0)
    killed = 0
    for attempt in range(11):
        student = _bigram(0)  # nothing survives but the file
        left = choose.randint(1, 25) if attempt < 10 else 1000

        def follow(ids: torch.Tensor) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise _Killed
            return teacher(ids)

        try:
            _train(student, follow, steps=60, checkpoint=tmp_path / "heal")  # type: ignore[arg-type]
        except _Killed:
            killed += 1
    assert killed >= 5
    assert torch.equal(student.weight, straight.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["heal"]


def test_by_the_clock_an_interrupted_run_has_the_time_that_was_left(tmp_path: Path) -> None:
    seen: list[Progress] = []

    def kill(state: Progress) -> None:
        if state.seconds > 30:
            raise _Killed

    with pytest.raises(_Killed):
        _train(_bigram(0), _bigram(1), minutes=1.0, checkpoint=tmp_path / "heal", report=kill)
    done = _train(_bigram(5), _bigram(1), minutes=1.0, checkpoint=tmp_path / "heal", report=seen.append)
    assert 0 < done.step <= 60
    assert done.best < done.first
    assert all(state.seconds > 30 for state in seen)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _train(_bigram(0), _bigram(1), steps=5, checkpoint=tmp_path / "heal")
    with pytest.raises(UnsupportedInputError, match="of other weights"):
        _train(nn.Sequential(_bigram(0)), _bigram(1), steps=5, checkpoint=tmp_path / "heal")


def test_nothing_to_train_is_an_error() -> None:
    student = _bigram(0).requires_grad_(False)
    with pytest.raises(UnsupportedInputError, match="without trainable parameters"):
        _train(student, _bigram(1), steps=1)


def test_a_text_shorter_than_a_window_is_an_error() -> None:
    with pytest.raises(UnsupportedInputError, match="no text of 81 tokens"):
        _train(_bigram(0), _bigram(1), steps=1, length=81)
