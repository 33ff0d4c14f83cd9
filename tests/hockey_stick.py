"""The slow oracle of accounting: integrals over densities, no privacy loss distributions, no divergences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import optimize, special

NODES, WEIGHTS = special.roots_legendre(20)


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one standard deviation."""

    weights: Sequence[float]
    means: Sequence[float]
    sigma: float

    def log_density(self, x: np.ndarray) -> np.ndarray:
        parts = [
            math.log(weight / self.sigma) - (x - mean) ** 2 / (2 * self.sigma**2)
            for weight, mean in zip(self.weights, self.means, strict=True)
            if weight > 0
        ]
        return np.logaddexp.reduce(parts, axis=0) - math.log(2 * math.pi) / 2


def one_step(q: float, sigma: float, shift: float = 1.0) -> Mixture:
    """The sum in one direction when the sample, of norm `shift`, is there."""
    return Mixture([1 - q, q], [0.0, shift], sigma)


def nothing(sigma: float) -> Mixture:
    return Mixture([1.0], [0.0], sigma)


def group(size: int, q: float, sigma: float) -> Mixture:
    chances = [math.comb(size, j) * q**j * (1 - q) ** (size - j) for j in range(size + 1)]
    return Mixture(chances, list(range(size + 1)), sigma)


def delta(upper: Mixture, lower: Mixture, epsilon: float) -> float:
    """Integral of the positive part of ``upper - exp(epsilon) * lower``."""

    def margin(x: float) -> float:
        at = np.array(x)
        return float(upper.log_density(at) - epsilon - lower.log_density(at))

    means = [*upper.means, *lower.means]
    low, high = min(means) - 12 * upper.sigma, max(means) + 12 * upper.sigma
    grid = np.linspace(low, high, 1001)
    positive = upper.log_density(grid) > epsilon + lower.log_density(grid)
    crossings = [
        float(optimize.brentq(margin, grid[i], grid[i + 1], xtol=1e-13))
        for i in np.flatnonzero(positive[1:] != positive[:-1])
    ]
    total = 0.0
    for left, right in pairwise([low, *crossings, high]):
        if margin((left + right) / 2) > 0:
            pieces = np.linspace(left, right, 2 + int((right - left) / upper.sigma))
            for start, end in pairwise(pieces):
                # 20 nodes for each standard deviation: exact to rounding.
                x = (start + end) / 2 + (end - start) / 2 * NODES
                excess = np.exp(upper.log_density(x)) - np.exp(epsilon + lower.log_density(x))
                total += float(excess @ WEIGHTS) * (end - start) / 2
    return total


def delta_of_steps(
    steps: Sequence[tuple[float, float]], epsilon: np.ndarray, *, removed: bool
) -> np.ndarray:
    """Poisson steps ``(q, sigma)`` in a row: what one revealed is taken off what the others may."""
    (q, sigma), *others = steps
    if not others:
        return _delta_of_one(q, sigma, epsilon, removed=removed)
    there, gone = one_step(q, sigma), nothing(sigma)
    upper, lower = (there, gone) if removed else (gone, there)
    pieces = np.linspace(-8.5 * sigma, 1 + 8.5 * sigma, 41)
    centres, halves = (pieces[1:] + pieces[:-1]) / 2, np.diff(pieces) / 2
    x = (centres[:, None] + halves[:, None] * NODES).ravel()
    weights = (halves[:, None] * WEIGHTS).ravel() * np.exp(upper.log_density(x))
    left = epsilon[..., None] - upper.log_density(x) + lower.log_density(x)
    return delta_of_steps(others, left, removed=removed) @ weights


def _delta_of_one(q: float, sigma: float, epsilon: np.ndarray, *, removed: bool) -> np.ndarray:
    """The privacy loss is monotone in the outcome: one threshold, then distribution functions."""
    ndtr = special.ndtr
    if removed:  # outcomes above it count, all of them if the ratio never falls so low
        odds = np.maximum((np.exp(epsilon) - (1 - q)) / q, 1e-300)
        x = sigma**2 * np.log(odds) + 0.5
        there = (1 - q) * ndtr(-x / sigma) + q * ndtr((1 - x) / sigma)
        return there - np.exp(epsilon) * ndtr(-x / sigma)
    odds = np.maximum((np.exp(-epsilon) - (1 - q)) / q, 1e-300)
    x = sigma**2 * np.log(odds) + 0.5
    there = (1 - q) * ndtr(x / sigma) + q * ndtr((x - 1) / sigma)
    return ndtr(x / sigma) - np.exp(epsilon) * there


def epsilon_at(target: float, delta_of: Callable[[float], float]) -> float:
    """Where a decreasing delta meets `target`."""
    if delta_of(0.0) <= target:
        return 0.0
    high = 1.0
    while delta_of(high) > target:
        high *= 2
    return float(optimize.brentq(lambda e: delta_of(e) - target, 0.0, high, xtol=1e-8))
