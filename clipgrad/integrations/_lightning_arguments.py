"""Refuse arguments of Lightning's ``Trainer`` that a private training cannot follow."""

from __future__ import annotations

import math
from typing import Any

from clipgrad.plan import PrivacyPlan


def refuse_conflicts(trainer: Any, plan: PrivacyPlan, *, is_replicated: bool) -> None:
    """Refuse arguments of the trainer that contradict the plan or would break privacy.

    Args:
        trainer: The trainer.
        plan: The plan.
        is_replicated: Whether its strategy leaves the model alone on each process.

    Raises:
        ValueError: If an argument is refused; the message names argument, value and remedy.
    """
    pieces, clip = trainer.accumulate_grad_batches, trainer.gradient_clip_val
    if pieces != 1:
        raise ValueError(
            f"Trainer(accumulate_grad_batches={pieces}) would add up several batches of the plan in one step, which "
            "the plan does not account for. Leave it out, and bound memory with private(..., microbatch_size=...)."
        )
    if clip:
        raise ValueError(
            f"Trainer(gradient_clip_val={clip}) clips the sum of a batch. Leave it out: the plan's max_grad_norm "
            "clips each sample's gradient."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "Trainer(precision='16-mixed') scales the loss, and per-sample gradients cannot be unscaled. Use "
            "precision='bf16-mixed'."
        )
    if trainer.world_size > 1 and not is_replicated:
        raise ValueError(
            f"Trainer(strategy=...) is a {type(trainer.strategy).__name__} for {trainer.world_size} processes, which "
            "would add up gradients that were not clipped, or spread the model. Set "
            "strategy=clipgrad.integrations.lightning.ReplicatedStrategy(), or devices=1."
        )
    steps = trainer.estimated_stepping_batches
    if steps > plan.steps:
        number = "without end" if math.isinf(steps) else f"{int(steps)} steps"
        raise ValueError(
            f"Trainer asks for {number}, but the plan has {plan.steps}. Set Trainer(max_steps={plan.steps}), or plan "
            "for more steps."
        )
