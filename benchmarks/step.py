"""The one interface behind every number: something that makes a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.workloads import Workload

LEARNING_RATE = 1e-4
NOISE_MULTIPLIER = 1.0
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What every mode of a row shares.

    Attributes:
        workload: Model, loss, batches.
        batch_size: Samples of one step.
        device: ``"cpu"`` or ``"cuda"``.
        max_grad_norm: Clipping norm of the private modes.
    """

    workload: Workload
    batch_size: int
    device: str = "cpu"
    max_grad_norm: float = 1.0

    def model_and_batch(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The same weights and the same samples at every call, on the device."""
        torch.manual_seed(SEED)
        model = self.workload.model()
        batch = self.workload.batch(self.batch_size)
        return model.to(self.device), tuple(leaf.to(self.device) for leaf in batch)


class Step(Protocol):
    """A training step, ready to run."""

    def __call__(self) -> None:
        """Gradient, clipping and noise if the mode has them, and the optimizer's step.

        On CUDA it may return before the device is done; whoever times it synchronises.
        Nothing per-sample stays alive after it.
        """
        ...


class PrivateStep(Step, Protocol):
    def clipped_gradient(self) -> Mapping[str, Tensor]:
        """The sum of clipped per-sample gradients at the current weights, without noise and not divided.

        By parameter name of ``workload.model()``, on any device. It may leave the step unusable.
        """
        ...


class Unavailable(Exception):
    """A mode that cannot run here; the message, "why", goes into its cell."""


def close(step: Step) -> None:
    """End the process that a step may have started."""
    ends: Callable[[], None] | None = getattr(step, "close", None)
    if ends is not None:
        ends()


Make = Callable[[Setting], Step]
