"""Refuse arguments of Lightning's ``Trainer`` that a private training cannot follow."""

from __future__ import annotations

import math
from typing import Any

from clipgrad.integrations._batches import SECRET_CHECKPOINTS
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
    if plan.mechanism is not None:
        raise ValueError(SECRET_CHECKPOINTS.format(mechanism=plan.mechanism))
    steps = trainer.estimated_stepping_batches
    if steps > plan.steps:
        number = "without end" if math.isinf(steps) else f"{int(steps)} steps"
        raise ValueError(
            f"Trainer asks for {number}, but the plan has {plan.steps}. Set Trainer(max_steps={plan.steps}), or plan "
            "for more steps."
        )


def refuse_private_decisions(trainer: Any) -> None:
    """Refuse callbacks and schedulers that decide by a value that is not private.

    Call this when the training has begun, since Lightning asks for schedulers and validation data then.

    Raises:
        ValueError: If there is one; the message names it.
    """
    found = [(type(c).__name__, getattr(c, "monitor", None)) for c in trainer.callbacks]
    found += [(type(c.scheduler).__name__, c.monitor) for c in trainer.lr_scheduler_configs]
    for name, monitor in found:
        if "_not_private" in str(monitor):
            raise ValueError(
                f"{name}(monitor={monitor!r}) decides by a function of the private data without noise, which the plan "
                "does not account for. Monitor a metric of public data, or choose the end, the schedule and the "
                "checkpoint beforehand."
            )
        if monitor is not None and _validates_on_training_data(trainer):
            raise ValueError(
                f"{name}(monitor={monitor!r}) decides by a metric, and the validation data is the training dataset. "
                "The plan does not account for such a decision. Validate on other data, or leave the callback out."
            )
    if "SpikeDetection" in dict(found):
        raise ValueError(
            "SpikeDetection leaves out batches by their loss, a function of the private data without noise, which the "
            "plan does not account for. Leave it out: clipping bounds what a sample can do."
        )


def _validates_on_training_data(trainer: Any) -> bool:
    loaders = trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    trained = getattr(trainer.train_dataloader, "dataset", None)
    return trained is not None and any(getattr(x, "dataset", None) is trained for x in loaders)
