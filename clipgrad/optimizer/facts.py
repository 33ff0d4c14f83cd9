"""List the values that must be equal in all processes: settings of the run, and the state of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from clipgrad.clipping import ClippingStrategy
from clipgrad.plan import PrivacyPlan


def of_run(
    plan: PrivacyPlan | None,
    norm: ClippingStrategy,
    noise_multiplier: float,
    expected_batch_size: float,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, object]:
    """Return the settings of the whole run; the values of functions of the step are compared at each step."""
    return {
        "max_grad_norm": norm,
        "noise_multiplier": noise_multiplier,
        "expected_batch_size": expected_batch_size,
        **_of_plan(plan),
        "optimizer": type(optimizer).__name__,
        "the list of trained parameters": [
            (name, tuple(p.shape), p.dtype) for name, p in zip(names, parameters, strict=True)
        ],
    }


def of_step(
    norm: ClippingStrategy, sigma: float, names: Sequence[str], position: tuple[Any, ...]
) -> dict[str, object]:
    """Return the values on which a step depends besides the data.

    Args:
        norm: The clipping norm; every norm in it is a number.
        sigma: Standard deviation of the noise.
        names: Names of the trained parameters.
        position: Position of the step in its plan, and of the batch in the loader's iteration.
    """
    return {
        "max_grad_norm": norm,
        "sigma": sigma,
        "the list of trained parameters": names,
        "the position in the plan": position,
    }


def _of_plan(plan: PrivacyPlan | None) -> dict[str, object]:
    if plan is None:
        return {"plan": None}
    values = {field.name: getattr(plan, field.name) for field in fields(plan) if field.repr}
    return {
        f"the plan's {name}": "a function of the step" if callable(value) else value
        for name, value in values.items()
    }
