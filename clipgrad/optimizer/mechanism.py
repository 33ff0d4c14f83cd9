"""What a step of ``DPOptimizer`` releases: said by a plan, or number by number; and where its noise comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from clipgrad import _validate
from clipgrad.clipping import Clipping, ClippingStrategy, Progress, Relation, Schedule, relation_of
from clipgrad.exact.grid import Grid, check_samples
from clipgrad.exact.noise import noise_on_grid, whole_steps
from clipgrad.noise import NoiseSource, SeededNoise, SystemNoise
from clipgrad.plan import PrivacyPlan


class Mechanism(NamedTuple):
    """The numbers that privacy depends on."""

    max_grad_norm: ClippingStrategy
    noise_multiplier: float | Schedule
    expected_batch_size: float
    relation: Relation
    grid: float | None


def mechanism(
    plan: PrivacyPlan | None,
    max_grad_norm: ClippingStrategy | None,
    noise_multiplier: float | Schedule | None,
    expected_batch_size: float | None,
    relation: Relation | str | None,
    grid: float | None,
) -> Mechanism:
    """From a plan, or from all of the numbers, and never from both.

    Raises:
        TypeError: If a number is missing.
        ValueError: If a plan and a number are given, or a number is out of range.
    """
    numbers = {
        "max_grad_norm": max_grad_norm,
        "noise_multiplier": noise_multiplier,
        "expected_batch_size": expected_batch_size,
    }
    if plan is not None and not isinstance(plan, PrivacyPlan):
        raise TypeError(f"plan must be a clipgrad.PrivacyPlan, got {type(plan).__name__}.")
    if plan is not None:
        given = {**numbers, "relation": relation, "grid": grid}
        if twice := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"plan says already what {', '.join(twice)} would say; leave it out, or make another plan."
            )
        return Mechanism(
            plan.max_grad_norm,
            plan.noise_multiplier,
            plan.expected_batch_size,
            plan.relation,
            plan.grid,
        )
    if missing := [name for name, value in numbers.items() if value is None]:
        raise TypeError(
            f"DPOptimizer needs {', '.join(missing)}: what privacy depends on has no default. Or give a plan: "
            "plan=clipgrad.PrivacyPlan(...)."
        )
    assert max_grad_norm is not None
    assert noise_multiplier is not None
    return Mechanism(
        max_grad_norm,
        noise_multiplier,
        _validate.positive("expected_batch_size", expected_batch_size),  # type: ignore[arg-type]
        relation_of(Relation.ADD_OR_REMOVE_ONE if relation is None else relation),
        grid,
    )


def noise_source(
    noise: NoiseSource | None,
    generator: torch.Generator | None,
    grid: float | None,
    expected_batch_size: float,
) -> NoiseSource:
    """The source that was asked for; the operating system's by default.

    Raises:
        ValueError: If two were asked for, or it is none.
    """
    if noise is not None and generator is not None:
        raise ValueError("noise and generator exclude each other; pass one of them, or neither.")
    if noise is not None and not callable(getattr(noise, "add_gaussian_", None)):
        raise ValueError(
            f"noise must be a NoiseSource such as clipgrad.SystemNoise(), got {noise!r}; how much of it there is "
            "says noise_multiplier."
        )
    if grid is not None:
        check_samples(2 * expected_batch_size, "twice the expected_batch_size")
        return noise_on_grid(grid, noise, generator)
    if noise is not None:
        return noise
    return SystemNoise() if generator is None else SeededNoise(generator)


def check_possible(progress: Progress, *, nan_safe: bool, grid: float | None) -> None:
    """Refuse combinations that no noise makes private, or not exactly.

    Raises:
        ValueError: With the reason and the remedy.
    """
    if grid is not None and progress.norm is not None:
        raise ValueError(
            f"grid cannot be combined with max_grad_norm={progress.strategy!r}: the noise of its count would not be "
            "exact. Give a norm, or a function of the step."
        )
    if progress.noise_multiplier > 0 and not nan_safe:
        raise ValueError(
            "nan_safe=False has no finite sensitivity: one sample's NaN would turn the whole sum into NaN, which no "
            "noise hides. Keep nan_safe=True, or clip without privacy: noise_multiplier=0, got "
            f"{progress.noise_multiplier}."
        )


def check_fits(clipping: Clipping, sizes: Sequence[int], grid: float | None, sigma: float) -> None:
    """Refuse a grid that is too coarse for the parameters or the noise, before the first step.

    Raises:
        ValueError: With a grid that works.
    """
    if grid is None:
        return
    Grid(grid, clipping, tuple(sizes))
    if sigma > 0:
        whole_steps(sigma, grid)
