"""What a training run reveals: epsilon at a given delta, and the noise that a given epsilon needs.

The accounting is Google's ``dp-accounting``; this module describes the run to it: ``steps`` times
the Gaussian mechanism on a *Poisson* sample, in which each sample is present independently with
probability ``sample_rate`` (:class:`clipgrad.sampling.PoissonSampler`). For shuffled batches of a
fixed size the figures do not hold. Nor do they cover anything else that was computed from the data:
hyperparameters tuned on it, statistics for its normalisation.

Two accountants: ``"pld"``, privacy loss distributions (Doroshenko et al., "Connect the Dots",
2022), takes a fraction of a second and is tight; it resolves no delta below 1e-12 and calls epsilon
infinite there. ``"rdp"``, Renyi differential privacy (Mironov, Talwar and Zhang, "Renyi
Differential Privacy of the Sampled Gaussian Mechanism", 2019), comes out about a tenth higher and
remembers the single step: asking again with more steps, as a progress bar does, costs a tenth of a
millisecond. Both are upper bounds.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

Accountant = Literal["pld", "rdp"]

_GRID = 1e-4
_COARSEST_GRID = 100.0  # from 700 on the exponential overflows
_TOLERANCE = 1e-4  # relative, of a calibrated noise multiplier
_MOST_NOISE = 2.0**30
# Less than this and epsilon exceeds any use, so that infinity is as good a bound.
_LEAST_NOISE = 1e-3


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    relation: str | Enum = "add_or_remove_one",
) -> float:
    """The epsilon for which the run is ``(epsilon, delta)`` differentially private.

    Args:
        noise_multiplier: Standard deviation of the noise per unit of sensitivity, where the
            sensitivity is that of ``relation``: twice the clip norm for ``"replace_one"``.
        sample_rate: Probability q of each sample to be in a batch, ``0 < q <= 1``.
        steps: Noisy steps of the run, empty batches included; at least 0.
        delta: Probability with which epsilon may fail to hold, ``0 < delta < 1``; choose it well
            below one over the number of samples.
        accountant: ``"pld"`` (tight) or ``"rdp"`` (quick when asked again).
        relation: Which datasets are neighbours: ``"add_or_remove_one"``, ``"replace_special"`` (the
            same figures) or ``"replace_one"`` (only ``"pld"``); or a :class:`clipgrad.Relation`.

    Returns:
        At least 0; infinite without noise, 0.0 without steps.

    Raises:
        ValueError: If a number is out of range or a name unknown.
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
    run = _Run.checked(sample_rate, steps, delta, accountant, relation)
    return run.epsilon(_at_least_0("noise_multiplier", noise_multiplier))


def noise_multiplier(
    *,
    target_epsilon: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    relation: str | Enum = "add_or_remove_one",
) -> float:
    """The smallest noise multiplier with which the run meets ``target_epsilon``.

    Args:
        target_epsilon: The epsilon not to exceed, positive; infinity needs no noise.
        sample_rate: As in :func:`epsilon`, also for the rest.
        steps: Noisy steps of the run.
        delta: Probability with which epsilon may fail to hold.
        accountant: ``"pld"`` or ``"rdp"``, which asks for some 5 % more noise.
        relation: Which datasets are neighbours.

    Returns:
        The noise multiplier, at most 0.01 % above the smallest; :func:`epsilon` of it is at most
        ``target_epsilon``. 0.0 if there are no steps or the target is infinite.

    Raises:
        ValueError: If a number is out of range, a name unknown, or no noise meets the target.
        ImportError: If ``dp-accounting`` is not installed.

    Examples:
        >>> run = {"sample_rate": 0.01, "steps": 1000, "delta": 1e-5, "accountant": "rdp"}
        >>> sigma = noise_multiplier(target_epsilon=2.0, **run)
        >>> round(sigma, 2), epsilon(noise_multiplier=sigma, **run) <= 2.0
        (1.02, True)
    """
    run = _Run.checked(sample_rate, steps, delta, accountant, relation)
    target = _at_least_0("target_epsilon", target_epsilon, infinity=True)
    if target == 0.0:
        raise ValueError("target_epsilon must be positive, got 0.0: only a run of no steps has it.")
    if run.steps == 0 or target == math.inf:
        return 0.0
    if run.accountant == "rdp":
        return _smallest_noise(run, target, start=1.0, factor=2.0)
    # Renyi accounting comes close at a fraction of the time.
    near = replace(run, accountant="rdp", relation="add_or_remove_one")
    start = _smallest_noise(near, target, start=1.0, factor=2.0)
    return _smallest_noise(run, target, start=start, factor=1.25)


def _smallest_noise(run: _Run, target: float, *, start: float, factor: float) -> float:
    """Every value that this returns has been checked to meet the target."""
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
    if lower < _LEAST_NOISE:
        return upper

    def gap(noise: float) -> float:  # finite, and nearly linear
        return math.log(min(max(run.epsilon(noise), 1e-12), 1e12) / target)

    tolerance = _TOLERANCE / 4 * lower
    root: float = _imported("scipy.optimize").brentq(gap, lower, upper, xtol=tolerance)
    while root < upper and run.epsilon(root) > target:  # the root may lie on either side
        root += tolerance
    return min(root, upper)


@dataclass(frozen=True)
class _Run:
    """All of a run but its noise."""

    sample_rate: float
    steps: int
    delta: float
    accountant: str
    relation: str

    @classmethod
    def checked(
        cls, sample_rate: float, steps: object, delta: float, accountant: str, relation: str | Enum
    ) -> _Run:
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 0:
            raise ValueError(f"steps must be an integer, at least 0, got {steps!r}.")
        rate = _at_least_0("sample_rate", sample_rate)
        if not 0.0 < rate <= 1.0:
            raise ValueError(
                f"sample_rate must be positive and at most 1, got {rate}; it is the expected batch "
                "size divided by the size of the dataset."
            )
        probability = _at_least_0("delta", delta)
        if not 0.0 < probability < 1.0:
            raise ValueError(
                f"delta must lie between 0 and 1, got {probability}; 1e-5, for example."
            )
        _one_of("accountant", accountant, ("pld", "rdp"))
        # The names of clipgrad.Relation, which this module cannot import: it comes with torch.
        name = relation.name.lower() if isinstance(relation, Enum) else relation
        _one_of("relation", name, ("add_or_remove_one", "replace_one", "replace_special"))
        if name == "replace_one" and accountant == "rdp":
            raise ValueError(
                "accountant 'rdp' cannot treat relation 'replace_one' under Poisson sampling; use "
                "accountant='pld'."
            )
        return cls(rate, int(steps), probability, accountant, name)

    def epsilon(self, noise: float) -> float:
        """At this noise per unit of the relation's sensitivity."""
        if self.steps == 0:
            return 0.0
        if noise < _LEAST_NOISE:
            return math.inf
        if self.accountant == "rdp":
            return _epsilon_by_rdp(noise, self.sample_rate, self.steps, self.delta)
        # dp-accounting counts noise in clip norms, and replacing a sample moves the sum by two.
        factor = 2 if self.relation == "replace_one" else 1
        return _epsilon_by_pld(self, noise * factor)


@lru_cache(maxsize=64)
def _epsilon_by_pld(run: _Run, noise: float) -> float:
    dp = _imported("dp_accounting")
    interval = _grid_interval(noise, run.sample_rate, run.steps)
    if interval > _COARSEST_GRID:
        return math.inf
    relation = dp.NeighboringRelation[run.relation.upper()]
    with _imported("numpy").errstate(over="ignore"):  # to infinity, and so on the safe side
        accountant = _imported("dp_accounting.pld").PLDAccountant(relation, interval)
        accountant.compose(_event(noise, run.sample_rate, run.steps))
        return float(accountant.get_epsilon(run.delta))


def _grid_interval(noise: float, sample_rate: float, steps: int) -> float:
    """Between privacy losses: 1e-4, dp-accounting's default, unless the losses are huge.

    With little noise they would fill the memory. A grid in proportion to them costs at most seconds,
    and the result stays an upper bound: rounding is upwards.
    """
    one_step = (0.5 / noise) ** 2
    # Of the whole run, in hundreds: the central limit (Dong, Roth and Su, "Gaussian Differential
    # Privacy", 2019), or all the steps without sampling if that is less.
    growth = math.expm1(noise**-2) if noise > 0.04 else math.inf
    limits = [sample_rate * math.sqrt(steps * growth), math.sqrt(steps) / noise]
    whole_run = min(mu * (mu / 2 + 5) for mu in limits) / 100
    return _GRID * max(1.0, one_step, whole_run)


def _epsilon_by_rdp(noise: float, sample_rate: float, steps: int, delta: float) -> float:
    orders, of_one_step = _rdp_of_one_step(noise, sample_rate)
    rdp = _imported("dp_accounting.rdp.rdp_privacy_accountant")
    bound, _ = rdp.compute_epsilon(orders, steps * of_one_step, delta)
    return float(bound)


@lru_cache(maxsize=64)
def _rdp_of_one_step(noise: float, sample_rate: float) -> tuple[Any, Any]:
    """Orders and Renyi divergences of one step; steps add up, so that this serves any number."""
    accountant = _imported("dp_accounting.rdp").RdpAccountant()
    with _without_warnings():
        accountant.compose(_event(noise, sample_rate, 1))
    return accountant.orders, accountant.rdp


@contextmanager
def _without_warnings() -> Iterator[None]:
    """dp-accounting warns of every Renyi order that it leaves out; leaving one out only loosens the bound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _event(noise: float, sample_rate: float, steps: int) -> Any:
    dp = _imported("dp_accounting")
    step = dp.PoissonSampledDpEvent(sample_rate, dp.GaussianDpEvent(noise))
    return dp.SelfComposedDpEvent(step, steps)


def _imported(module: str) -> Any:
    """Imported when first needed: training itself can do without."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} could not be imported ({error}); accounting needs it: "
            "pip install 'clipgrad[accounting]'"
        ) from error


def _at_least_0(name: str, value: object, *, infinity: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r}.")
    number = float(value)
    if not (number >= 0.0 and (infinity or math.isfinite(number))):
        raise ValueError(f"{name} must be at least 0 and finite, got {number}.")
    return number


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
