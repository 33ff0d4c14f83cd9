"""Losses in the form that some libraries ask for: a criterion of the model's output and a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step import Unavailable
from benchmarks.workloads import Workload
from benchmarks.workloads.cnn import classification
from benchmarks.workloads.diffusion import STEPS, denoising
from benchmarks.workloads.transformer import next_token

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Criterion:
    """``loss(model, *batch)`` taken apart.

    Attributes:
        make: Makes the criterion, an ``nn.Module`` with a ``reduction``.
        split: From the batch to the model's arguments and the target.
        per_token: Whether output and target have an axis of tokens after that of samples, over which the loss is
            a mean as well.
    """

    make: Callable[[], nn.Module]
    split: Callable[..., tuple[Batch, Tensor]]
    per_token: bool = False


class SquaredError(nn.Module):
    """Mean squared error whose ``reduction="none"`` leaves the axis of samples alone.

    ``nn.MSELoss`` would leave all axes, and Opacus takes what is left for a loss per sample.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        return losses if self.reduction == "none" else losses.mean()


def criterion(workload: Workload) -> Criterion:
    """The workload's loss as a criterion.

    Raises:
        Unavailable: If nobody wrote it down.
    """
    found = _criteria().get(workload.loss)
    if found is None:
        raise Unavailable(
            f"this library needs a criterion of output and target, and none was written for {workload.loss.__name__}"
        )
    return found


def _shifted(ids: Tensor) -> tuple[Batch, Tensor]:
    # Opacus ghost's rule for embeddings takes a view of the indices.
    return (ids[:, :-1].contiguous(),), ids[:, 1:].contiguous()


def _noisy_images(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Batch, Tensor]:
    angle = ((t + 0.5) / STEPS * (math.pi / 2))[:, None, None, None].to(x.dtype)
    return (angle.cos() * x + angle.sin() * noise, t), noise


def _criteria() -> dict[Callable[..., Tensor], Criterion]:
    return {
        classification: Criterion(nn.CrossEntropyLoss, lambda x, y: ((x,), y)),
        next_token: Criterion(nn.CrossEntropyLoss, _shifted, per_token=True),
        denoising: Criterion(SquaredError, _noisy_images),
    }
