"""Schedulers see DPOptimizer as the optimizer that it wraps, and warn about nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules

from tests.dp_tools import assert_same, data, mlp, private, sgd, values

Make = Callable[[Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "step": lambda o: schedules.StepLR(o, step_size=2, gamma=0.5),
    "lambda": lambda o: schedules.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=5),
    "one_cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.5, total_steps=8),
    "cyclic": lambda o: schedules.CyclicLR(o, base_lr=0.1, max_lr=0.5, step_size_up=2),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, factor=0.3),
    "chained": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)], milestones=[2]
    ),
}


def run(make: Make, *, around_private: bool, steps: int = 6) -> tuple[list[Any], dict[str, Any]]:
    """Rates and momenta step by step, and the weights after them; constant gradients of one sample."""
    model = mlp()
    inner = sgd(model, lr=0.2, momentum=0.9)
    optimizer = private(model, inner=inner, max_grad_norm=1e9)
    scheduler = make(optimizer if around_private else inner)
    seen = []
    for index in range(steps):
        optimizer.backward(data(3, seed=index))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(1.0) if "Plateau" in type(scheduler).__name__ else scheduler.step()
        seen.append((inner.param_groups[0]["lr"], inner.param_groups[0]["momentum"]))
    return seen, values(model)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_scheduler_acts_as_on_the_wrapped_optimizer(name: str) -> None:
    around, ends = run(SCHEDULERS[name], around_private=True)
    inside, also = run(SCHEDULERS[name], around_private=False)
    assert around == inside
    assert len({rate for rate, _ in around}) > 1
    assert_same(ends, also)


def test_a_scheduler_before_the_first_step_is_warned_about_as_usual() -> None:
    optimizer = private(mlp())
    scheduler = schedules.StepLR(optimizer, step_size=1)
    optimizer.backward(data())
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step"):
        scheduler.step()
    optimizer.step()


def test_scheduler_state_and_weights_averaging() -> None:
    model = mlp()
    optimizer = private(model)
    scheduler = schedules.StepLR(optimizer, step_size=1, gamma=0.5)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for index in range(2):
        optimizer.backward(data(seed=index))
        optimizer.step()
        scheduler.step()
        averaged.update_parameters(model)
    saved = scheduler.state_dict()
    other = schedules.StepLR(private(mlp()), step_size=1, gamma=0.5)
    other.load_state_dict(saved)
    assert other.get_last_lr() == scheduler.get_last_lr() == [0.25]
