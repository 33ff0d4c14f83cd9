"""What ``DPTrainer`` logs, found without waiting for the device in every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


class NoisedNorm(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """This callback keeps the norm of the noisy gradient, which is public, of the steps that are logged."""

    def __init__(self) -> None:
        self._norm: Tensor | None = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Find the norm before the gradient is cleared, if this step may be logged."""
        self._norm = None
        step = state.global_step + 1
        by_steps = args.logging_strategy == IntervalStrategy.STEPS
        if by_steps and step % state.logging_steps and not (args.logging_first_step and step == 1):
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)

    def norm(self) -> float | None:
        """Return the norm of the last step; None if the step was not to be logged."""
        return None if self._norm is None else float(self._norm)


class FiniteLosses:
    """This class replaces a loss that is not finite by the last finite one, on the device.

    The trainer's own filter (``logging_nan_inf_filter``) reads each loss on the host. It waits for the device in every
    step, and what the host does for a step then adds to the step's time. So the setting is off while the trainer looks
    at it, between ``hide`` and ``restore``.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._is_hidden = False

    def hide(self, args: TrainingArguments) -> bool:
        """Switch the trainer's own filter off, and return whether the user wants one."""
        self._is_hidden = self._is_hidden or args.logging_nan_inf_filter
        args.logging_nan_inf_filter = False
        return self._is_hidden

    def of(self, loss: Tensor) -> Tensor:
        """Return the loss, or the last one that was finite; 0 before the first."""
        last = loss.new_zeros(()) if self._last is None else self._last
        self._last = torch.where(loss.isfinite(), loss, last)
        return self._last

    def restore(self, args: TrainingArguments) -> None:
        """Put the user's setting back."""
        if self._is_hidden:
            args.logging_nan_inf_filter, self._is_hidden = True, False
