"""Plan runs of equal steps: their epsilon, the noise that a target needs, the number of steps that it allows."""

from __future__ import annotations

import math
from enum import Enum

from . import _checks
from ._checks import Accountant
from ._equal_steps import EqualSteps
from ._sampling import Sampling
from ._search import most_steps, smallest_noise, smallest_noise_by_slope

_LEAST_PLD_DELTA = 1e-12


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float | None = None,
    sampling: Sampling | None = None,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    relation: str | Enum = "add_or_remove_one",
    group_size: int = 1,
) -> float:
    """Return the epsilon for which the run is ``(epsilon, delta)`` differentially private.

    Args:
        noise_multiplier: Standard deviation of the noise per unit of sensitivity under ``relation``. For
            ``"replace_one"`` the sensitivity is twice the clip norm.
        sample_rate: Probability q of each sample to be in a batch, ``0 < q <= 1``; short for ``sampling=Poisson(q)``.
            Give exactly one of the two.
        sampling: How batches are sampled.
        steps: Noisy steps of the run, empty batches included; at least 0.
        delta: Probability with which epsilon may fail to hold, ``0 < delta < 1``; choose it well below one over the
            number of samples.
        accountant: ``"pld"`` (tight), ``"rdp"`` (quick for repeated queries) or ``"rdp_integer"`` (for exact mode).
        relation: Which datasets are neighbours: ``"add_or_remove_one"``, ``"replace_special"`` (the same figures) or
            ``"replace_one"`` (under Poisson sampling with ``"pld"`` only); or a :class:`clipgrad.Relation`.
        group_size: The largest number of samples of one person; neighbours then differ in all of them.

    Returns:
        A number of at least 0; infinite without noise, 0.0 without steps.

    Raises:
        ValueError: If a number is out of range, a name unknown, or a combination has no bound here.
        ImportError: If ``dp-accounting`` is not installed.

    Examples:
        >>> run = {"sample_rate": 256 / 60_000, "steps": 15 * 234, "delta": 1e-5}
        >>> round(epsilon(noise_multiplier=1.3, **run), 2)
        0.86
        >>> round(epsilon(noise_multiplier=1.3, accountant="rdp", **run), 2)
        0.95
        >>> epsilon(noise_multiplier=0.0, **run)
        inf
    """
    run = EqualSteps.from_arguments(
        sample_rate, sampling, steps, delta, accountant, relation, group_size
    )
    return run.epsilon(_checks.at_least_0("noise_multiplier", noise_multiplier))


def noise_multiplier(
    *,
    target_epsilon: float,
    sample_rate: float | None = None,
    sampling: Sampling | None = None,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    relation: str | Enum = "add_or_remove_one",
    group_size: int = 1,
) -> float:
    """Return the smallest noise multiplier with which the run meets ``target_epsilon``.

    Args:
        target_epsilon: The epsilon not to exceed, positive; infinity needs no noise.
        sample_rate: As in :func:`epsilon`.
        sampling: As in :func:`epsilon`.
        steps: Noisy steps of the run.
        delta: Probability with which epsilon may fail to hold.
        accountant: As in :func:`epsilon`; ``"rdp"`` requires about 5 % more noise than ``"pld"``.
        relation: Which datasets are neighbours.
        group_size: The largest number of samples of one person.

    Returns:
        The noise multiplier, at most 0.01 % above the smallest; its :func:`epsilon` is at most ``target_epsilon``. 0.0
        if there are no steps or the target is infinite.

    Raises:
        ValueError: If a number is out of range, a name unknown, a combination has no bound here, or no noise meets the
            target.
        ImportError: If ``dp-accounting`` is not installed.

    Examples:
        >>> run = {"sample_rate": 0.01, "steps": 1000, "delta": 1e-5, "accountant": "rdp"}
        >>> sigma = noise_multiplier(target_epsilon=2.0, **run)
        >>> round(sigma, 2), epsilon(noise_multiplier=sigma, **run) <= 2.0
        (1.02, True)
    """
    run = EqualSteps.from_arguments(
        sample_rate, sampling, steps, delta, accountant, relation, group_size
    )
    target = _target(target_epsilon)
    if run.steps == 0 or target == math.inf:
        return 0.0
    if run.accountant != "pld":
        return smallest_noise(run, target, start=1.0, factor=2.0)
    # Renyi accounting gives a close first guess in a fraction of the time.
    start = smallest_noise(run.renyi_estimate(), target, start=1.0, factor=2.0)
    noise = smallest_noise_by_slope(run, target, start)
    if run.delta < _LEAST_PLD_DELTA and run.epsilon(noise) < target / 2:
        raise ValueError(
            f"delta = {run.delta} is below what accountant='pld' resolves, about {_LEAST_PLD_DELTA}: target_epsilon = "
            f"{target} would take {noise / start:.0f} times the noise that it needs. Pass accountant='rdp', or a "
            "larger delta; a tenth of 1 / num_samples is usual."
        )
    return noise


def steps(
    *,
    target_epsilon: float,
    noise_multiplier: float,
    sample_rate: float | None = None,
    sampling: Sampling | None = None,
    delta: float,
    accountant: Accountant = "pld",
    relation: str | Enum = "add_or_remove_one",
    group_size: int = 1,
) -> int:
    """Return the largest number of steps that stays within ``target_epsilon``.

    Args:
        target_epsilon: The epsilon not to exceed, positive and finite.
        noise_multiplier: As in :func:`epsilon`.
        sample_rate: As in :func:`epsilon`.
        sampling: As in :func:`epsilon`.
        delta: Probability with which epsilon may fail to hold.
        accountant: As in :func:`epsilon`; ``"rdp"`` allows about 10 to 20 % fewer steps than ``"pld"``.
        relation: Which datasets are neighbours.
        group_size: The largest number of samples of one person.

    Returns:
        A number from 0 to ``2**40``, where the search ends. Its :func:`epsilon` is at most ``target_epsilon``; with one
        more step epsilon exceeds the target.

    Raises:
        ValueError: If a number is out of range, a name unknown, or a combination has no bound here.
        ImportError: If ``dp-accounting`` is not installed.

    Examples:
        >>> run = {"noise_multiplier": 1.0, "sample_rate": 0.01, "delta": 1e-5, "accountant": "rdp"}
        >>> most = steps(target_epsilon=2.0, **run)
        >>> epsilon(steps=most, **run) <= 2.0 < epsilon(steps=most + 1, **run)
        True
    """
    run = EqualSteps.from_arguments(
        sample_rate, sampling, 1, delta, accountant, relation, group_size
    )
    target = _target(target_epsilon)
    noise = _checks.at_least_0("noise_multiplier", noise_multiplier)
    if target == math.inf:
        raise ValueError("target_epsilon must be finite, got inf, which any number of steps meets.")
    start = 1
    if run.accountant == "pld":
        near = run.renyi_estimate()
        start = max(1, most_steps(lambda count: near.with_steps(count).epsilon(noise), target, 1))
    return most_steps(lambda count: run.with_steps(count).epsilon(noise), target, start)


def _target(value: object) -> float:
    target = _checks.at_least_0("target_epsilon", value, infinity=True)
    if target == 0.0:
        raise ValueError(
            "target_epsilon must be positive, got 0.0, which only a run without steps meets."
        )
    return target
