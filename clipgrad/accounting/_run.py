"""Plan runs of equal steps: their epsilon, the noise that a target needs, the number of steps that it allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from . import _checks
from ._backends import backend, epsilon_of
from ._checks import Accountant
from ._dp import load_module
from ._sampling import Poisson, Sampling, TruncatedPoisson, require_sampling, require_supported
from ._terms import LEAST_NOISE, Terms, terms_of

_TOLERANCE = 1e-4  # relative error of a calibrated noise multiplier
_COARSENESS, _MOST_SECANTS = 16, 8  # for the search for a noise multiplier
_MOST_NOISE = 2.0**30
_MOST_STEPS = 2**40


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
    run = _Run.from_arguments(sample_rate, sampling, steps, delta, accountant, relation, group_size)
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
    run = _Run.from_arguments(sample_rate, sampling, steps, delta, accountant, relation, group_size)
    target = _target(target_epsilon)
    if run.steps == 0 or target == math.inf:
        return 0.0
    if run.accountant != "pld":
        return _smallest_noise(run, target, start=1.0, factor=2.0)
    # Renyi accounting gives a close first guess in a fraction of the time.
    start = _smallest_noise(run.renyi_estimate(), target, start=1.0, factor=2.0)
    return _smallest_noise_by_slope(run, target, start)


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
    run = _Run.from_arguments(sample_rate, sampling, 1, delta, accountant, relation, group_size)
    target = _target(target_epsilon)
    noise = _checks.at_least_0("noise_multiplier", noise_multiplier)
    if target == math.inf:
        raise ValueError("target_epsilon must be finite, got inf, which any number of steps meets.")
    start = 1
    if run.accountant == "pld":
        near = run.renyi_estimate()
        start = max(1, _most_steps(lambda count: near.with_steps(count).epsilon(noise), target, 1))
    return _most_steps(lambda count: run.with_steps(count).epsilon(noise), target, start)


def _most_steps(epsilon_of: Callable[[int], float], target: float, start: int) -> int:
    """Return the largest number of steps after checking that it meets the target and one step more does not."""
    within, beyond = 0, min(start, _MOST_STEPS)
    known = {0: 0.0}

    def meets(count: int) -> bool:
        known[count] = epsilon_of(count)
        return known[count] <= target

    while meets(beyond):
        within = beyond
        if within == _MOST_STEPS:
            return within
        beyond = min(_MOST_STEPS, within + max(1, within // 4) if start > 1 else 2 * within)
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


def _smallest_noise(run: _Run, target: float, *, start: float, factor: float) -> float:
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


def _smallest_noise_by_slope(run: _Run, target: float, start: float) -> float:
    """Return the same as ``_smallest_noise`` with three or four slow evaluations of epsilon instead of eight or nine.

    On a coarser grid epsilon takes a twentieth of the time. Its curve gives a first noise multiplier and the slope of
    epsilon; the secant method continues from there. The result is checked from both sides.
    """
    coarse = replace(run, coarseness=_COARSENESS)
    try:
        noise = _smallest_noise(coarse, target, start=start, factor=1.25)
    except ValueError:  # the coarse bound does not get this small for any noise
        return _smallest_noise(run, target, start=start, factor=1.25)
    slope = math.log(coarse.epsilon(1.01 * noise) / coarse.epsilon(noise)) / math.log(1.01)
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
    return _smallest_noise(run, target, start=noise, factor=1.25)


def _target(value: object) -> float:
    target = _checks.at_least_0("target_epsilon", value, infinity=True)
    if target == 0.0:
        raise ValueError(
            "target_epsilon must be positive, got 0.0, which only a run without steps meets."
        )
    return target


@dataclass(frozen=True)
class _Run:
    """This class describes a run except for its noise."""

    sampling: Sampling
    steps: int
    delta: float
    accountant: str
    relation: str
    group_size: int
    coarseness: int = 1
    """Factor on the interval of the grid of privacy losses; epsilon stays an upper bound."""

    @classmethod
    def from_arguments(
        cls,
        sample_rate: float | None,
        sampling: Sampling | None,
        steps: object,
        delta: object,
        accountant: object,
        relation: object,
        group_size: object,
    ) -> _Run:
        count = _checks.integer("steps", steps, least=0)
        if (sample_rate is None) == (sampling is None):
            raise ValueError(
                f"sample_rate and sampling are {sample_rate} and {sampling}; give exactly one of "
                "them: sample_rate=q stands for sampling=Poisson(q)."
            )
        drawn = require_sampling(sampling) if sample_rate is None else Poisson(sample_rate)
        probability = _checks.probability("delta", delta)
        by, name = _checks.accountant_name(accountant), _checks.relation_name(relation)
        size = _checks.integer("group_size", group_size, least=1)
        require_supported(drawn, relation=name, accountant=by, group_size=size)
        return cls(drawn, count, probability, by, name, size)

    def epsilon(self, noise: float) -> float:
        """Return epsilon for a noise multiplier, in units of the relation's sensitivity."""
        if self.steps == 0:
            return 0.0
        runs = [(noise, self.sampling, self.steps, 0)]
        terms = terms_of(runs, relation=self.relation, group_size=self.group_size)
        return _epsilon(terms, self.delta, self.accountant, self.coarseness)

    def with_steps(self, steps: int) -> _Run:
        return replace(self, steps=steps)

    def renyi_estimate(self) -> _Run:
        """Return a run with about the same epsilon that Renyi accounting supports."""
        renyi = replace(self, accountant="rdp")
        match self.sampling:
            case Poisson(rate) | TruncatedPoisson(rate):
                near = Poisson(min(1.0, rate * self.group_size))
                return replace(renyi, sampling=near, relation="add_or_remove_one", group_size=1)
        return renyi


@lru_cache(maxsize=64)
def _epsilon(terms: Terms, delta: float, accountant: str, coarseness: int) -> float:
    return epsilon_of(terms, delta, backend(accountant, coarseness=coarseness))
