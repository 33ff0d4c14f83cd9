"""Account by privacy loss distributions (PLDs), whose convolution is the composition of mechanisms."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from ._dp import load_module
from ._terms import Mechanism, Terms

_GRID = 1e-4
# For groups the grid is this many times as coarse: mixtures of Gaussians are slow, and the bound grows by thousandths.
_GROUP_GRID = 4
_COARSEST_GRID = 100.0  # the exponential overflows from 700 on


class PrivacyLoss:
    """This accountant serves growing histories: it caches the PLD of all mechanisms but the last.

    ``coarseness``, a power of two, is a factor on the grid's interval: larger is faster and gives a larger bound.
    """

    def __init__(self, coarseness: int = 1) -> None:
        self._coarseness = coarseness
        self._interval = 0.0
        self._finished: tuple[tuple[Mechanism, int], ...] = ()
        self._pld: Any = None

    def epsilon(self, terms: Terms, delta: float) -> float:
        """Return the epsilon at ``delta``."""
        if not terms.sampled:
            sigma = terms.precision**-0.5
            gaussian = load_module("dp_accounting.gaussian_mechanism")
            return float(gaussian.get_epsilon_gaussian(sigma, delta))
        # An overflow to infinity keeps the bound valid.
        with load_module("numpy").errstate(over="ignore"):
            pld = self._composed(terms)
            return math.inf if pld is None else float(pld.get_epsilon_for_delta(delta))

    def delta(self, terms: Terms, epsilon: float) -> float:
        """Return the delta at ``epsilon``."""
        if not terms.sampled:
            return _delta_of_gaussian(math.sqrt(terms.precision), epsilon)
        with load_module("numpy").errstate(over="ignore"):
            pld = self._composed(terms)
            return 1.0 if pld is None else min(1.0, float(pld.get_delta_for_epsilon(epsilon)))

    def _composed(self, terms: Terms) -> Any:
        """Return the PLD of the history, or None if the losses are too large to be resolved."""
        interval = self._coarseness * grid_interval(terms)
        if interval > _COARSEST_GRID:
            return None
        *finished, (last, count) = terms.sampled
        known = len(self._finished)
        if interval != self._interval or tuple(finished[:known]) != self._finished:
            distributions = load_module("dp_accounting.pld.privacy_loss_distribution")
            known, self._pld = 0, distributions.identity(interval)
        for mechanism, times in finished[known:]:
            self._pld = self._pld.compose(_of_one_step(mechanism, interval).self_compose(times))
        self._interval, self._finished = interval, tuple(finished)
        composed = self._pld.compose(_of_one_step(last, interval).self_compose(count))
        if terms.precision:
            composed = composed.compose(_of_gaussian(terms.precision, interval))
        return composed


def grid_interval(terms: Terms) -> float:
    """Return the interval between privacy losses: 1e-4, dp-accounting's default, unless the losses are huge.

    With little noise, losses on the default grid would fill the memory. A grid in proportion to them takes seconds at
    most, and the result stays an upper bound, since rounding is upwards. Intervals are powers of two of the default, so
    that a grid is a subset of every finer grid and gives a higher bound. Thus a run that outgrows a grid does not
    appear more private.
    """
    least, variance = max(1.0, terms.precision / 4), terms.precision
    for mechanism, count in terms.sampled:
        one_step, growth = _spread(mechanism)
        least = max(least, one_step, _GROUP_GRID if mechanism.group_size > 1 else 1.0)
        variance += count * growth
    # Losses of the whole run in units of 100: their mean, mu^2 / 2, and 5 standard deviations, each mu.
    mu = math.sqrt(variance)
    whole_run = mu * (mu / 2 + 5) / 100
    needed = max(least, whole_run)
    return _GRID * 2.0 ** math.ceil(math.log2(needed)) if math.isfinite(needed) else math.inf


@lru_cache(maxsize=256)
def _spread(mechanism: Mechanism) -> tuple[float, float]:
    """Return the size of the losses of one step, and what the step adds to the variance of the run's loss.

    The variance follows from the central limit theorem (Dong, Roth and Su, "Gaussian Differential Privacy", 2019), or
    is the variance without sampling if that is smaller. Only the grid depends on these numbers, not the validity of the
    bound.
    """
    rate, noise = mechanism.rate, mechanism.noise
    if mechanism.truncation is not None:
        rate, noise = min(1.0, 2 * rate), noise / 2  # one sample enters and one leaves the batch
    if mechanism.group_size == 1:
        growth = rate**2 * _expm1(noise**-2)
        return (0.5 / noise) ** 2, min(growth, noise**-2)
    size = mechanism.group_size
    # A batch holds more samples of the group than this with probability 1e-15 at most.
    most = int(load_module("scipy.stats").binom.isf(1e-15, size, rate))
    # The mean square of their number in a batch.
    squared = size * rate * (1 - rate) + (size * rate) ** 2
    return (0.5 * most / noise) ** 2, squared * noise**-2


def _expm1(exponent: float) -> float:
    return math.expm1(exponent) if exponent < 700 else math.inf


@lru_cache(maxsize=8)
def _of_one_step(mechanism: Mechanism, interval: float) -> Any:
    """Return the PLD of one step. It takes about a second, and a power of it a fraction of a second."""
    distributions = load_module("dp_accounting.pld.privacy_loss_distribution")
    relation = load_module("dp_accounting").NeighboringRelation[mechanism.relation.upper()]
    if mechanism.truncation is not None:
        num_samples, most = mechanism.truncation
        return distributions.from_truncated_subsampled_gaussian_mechanism(
            num_samples,
            mechanism.rate,
            most,
            mechanism.noise,
            value_discretization_interval=interval,
            neighboring_relation=relation,
        )
    if mechanism.group_size > 1:
        # Ganesh, "Tight Group-Level DP Guarantees for DP-SGD with Sampling via Mixture of Gaussians
        # Mechanisms", 2024: each of the group's samples in the batch moves the sum by a clip norm.
        size, counts = mechanism.group_size, list(range(mechanism.group_size + 1))
        return distributions.from_mixture_gaussian_mechanism(
            mechanism.noise,
            counts,
            load_module("scipy.stats").binom.pmf(counts, size, mechanism.rate).tolist(),
            value_discretization_interval=interval,
        )
    return distributions.from_gaussian_mechanism(
        mechanism.noise,
        value_discretization_interval=interval,
        sampling_prob=mechanism.rate,
        neighboring_relation=relation,
    )


@lru_cache(maxsize=8)
def _of_gaussian(precision: float, interval: float) -> Any:
    distributions = load_module("dp_accounting.pld.privacy_loss_distribution")
    return distributions.from_gaussian_mechanism(
        precision**-0.5, value_discretization_interval=interval
    )


def _delta_of_gaussian(mu: float, epsilon: float) -> float:
    """Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", 2018, theorem 8."""
    special = load_module("scipy.special")
    above = float(special.ndtr(mu / 2 - epsilon / mu))
    below = math.exp(epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu)))
    return max(0.0, above - below)
