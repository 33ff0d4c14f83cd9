"""A training step whose parts take known times, by a clock that moves only when told to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer
from tests.dp_tools import private


class Clock:
    """Seconds that pass only by ``work``."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


# One for all: copies of an optimizer have to tell the same time.
CLOCK = Clock()


class SlowNoise:
    """Two seconds, whatever the tensors."""

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        CLOCK.work(2)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class SlowSGD(torch.optim.SGD):
    """One second a step, and no step."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        CLOCK.work(1)


class SlowBackward(torch.autograd.Function):
    """The identity; four seconds in its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        CLOCK.work(4)
        return gradient


def slow_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Three seconds forward, four backward."""
    CLOCK.work(3)
    return SlowBackward.apply(model(x)).square().mean()


def slow(**options: Any) -> DPOptimizer:
    """One linear layer on four inputs; everything that the library itself does takes no time."""
    model = nn.Linear(4, 4)
    inner = SlowSGD(model.parameters(), lr=1.0)
    options = {"noise": SlowNoise(), "noise_multiplier": 1.0, **options}
    return private(model, slow_loss, inner=inner, **options)
