"""This module searches for the noise or the number of steps that meets a target epsilon, and checks what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ._dp import load_module
from ._equal_steps import EqualSteps
from ._terms import LEAST_NOISE

_TOLERANCE = 1e-4  # relative error of a calibrated noise multiplier
_COARSENESS, _MOST_SECANTS = 16, 8  # for the search for a noise multiplier
_MOST_NOISE = 2.0**30
MOST_STEPS = 2**40


def most_steps(epsilon_of: Callable[[int], float], target: float, start: int) -> int:
    """Return the largest number of steps after checking that it meets the target and one step more does not."""
    within, beyond = 0, min(start, MOST_STEPS)
    known = {0: 0.0}

    def meets(count: int) -> bool:
        known[count] = epsilon_of(count)
        return known[count] <= target

    while meets(beyond):
        within = beyond
        if within == MOST_STEPS:
            return within
        beyond = min(MOST_STEPS, within + max(1, within // 4) if start > 1 else 2 * within)
    while beyond - within > 1:
        # Epsilon grows approximately as a power of the steps; where it does not, halving makes progress.
        guess = (within + beyond) // 2
        low, high = known[within], known[beyond]
        if len(known) % 2 and within and 0 < low < target < high < math.inf:
            slope = math.log(beyond / within) / math.log(high / low)
            # One more than the estimate, so that both ends of the interval converge.
            guess = math.floor(within * (target / low) ** slope) + 1
            guess = min(max(guess, within + 1), beyond - 1)
        if meets(guess):
            within = guess
        else:
            beyond = guess
    return within


def smallest_noise(run: EqualSteps, target: float, *, start: float, factor: float) -> float:
    """Return a noise multiplier close to the smallest, after checking that it meets the target."""
    upper = start
    while run.epsilon(upper) > target:
        upper *= factor
        if upper > _MOST_NOISE:
            raise ValueError(
                f"target_epsilon = {target} at delta = {run.delta} is not met by a noise "
                f"multiplier of {_MOST_NOISE:.0f}; raise target_epsilon or delta, or take fewer steps."
            )
    lower = upper / factor
    while run.epsilon(lower) <= target:
        upper, lower = lower, lower / factor
    if lower < LEAST_NOISE:
        return upper

    def gap(noise: float) -> float:  # finite and nearly linear, as brentq needs
        return math.log(min(max(run.epsilon(noise), 1e-12), 1e12) / target)

    tolerance = _TOLERANCE / 4 * lower
    root: float = load_module("scipy.optimize").brentq(gap, lower, upper, xtol=tolerance)
    while root < upper and run.epsilon(root) > target:  # the root may lie on either side
        root += tolerance
    return min(root, upper)


def smallest_noise_by_slope(run: EqualSteps, target: float, start: float) -> float:
    """Return the same as ``smallest_noise`` with three or four slow evaluations of epsilon instead of eight or nine.

    On a coarser grid epsilon takes a twentieth of the time. Its curve gives a first noise multiplier and the slope of
    epsilon; the secant method continues from there. The result is checked from both sides.
    """
    coarse = replace(run, coarseness=_COARSENESS)
    try:
        noise = smallest_noise(coarse, target, start=start, factor=1.25)
    except ValueError:  # the coarse bound does not get this small for any noise
        return smallest_noise(run, target, start=start, factor=1.25)
    here, beside = coarse.epsilon(noise), coarse.epsilon(1.01 * noise)
    if not 0.0 < beside < here:  # so small a target is met by a jump of the coarse curve to 0
        return smallest_noise(run, target, start=noise, factor=1.25)
    slope = math.log(beside / here) / math.log(1.01)
    for _ in range(_MOST_SECANTS):
        found = run.epsilon(noise)
        if not (0.0 < found < math.inf and -math.inf < slope < 0.0):
            break
        beyond = math.log(target / found) / -slope  # relative excess over the smallest noise
        if 0.0 <= beyond < _TOLERANCE / 2 and run.epsilon(noise * (1 - 0.75 * _TOLERANCE)) > target:
            return noise
        # A little more noise than estimated, so that it meets the target.
        following = noise * math.exp(-beyond + _TOLERANCE / 8)
        ahead = run.epsilon(following)
        if ahead > 0.0 and following != noise:
            slope = math.log(ahead / found) / math.log(following / noise)
        noise = following
    return smallest_noise(run, target, start=noise, factor=1.25)
