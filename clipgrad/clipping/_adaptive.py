"""This module adapts the clipping norm to a quantile of the gradient norms, privately."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipgrad import _validate
from clipgrad.clipping._relation import Relation, most_contributions

_LARGEST_EXPONENT = 700.0  # exp(710) does not fit a float


@dataclass(frozen=True)
class AdaptiveQuantile:
    """This strategy moves the clipping norm so that a given share of the samples is not clipped.

    Andrew, Thakkar, McMahan and Ramaswamy, "Differentially Private Learning with Adaptive Clipping", 2021,
    arXiv:1905.03871, algorithm 1. After each step

    ``C <- C * exp(-learning_rate * (b - target_quantile))``, ``b = 1/2 + (sum_i (b_i - 1/2) + noise) / m``

    with ``b_i = 1`` if the norm of sample i is at most C and else 0. ``m`` is the expected batch size, a public
    constant, and the noise has standard deviation ``count_stddev``. A sample whose gradient is not finite has
    ``b_i = 0``; padding is not counted. C depends on nothing else in the data.

    **One adaptive step costs as much as one Gaussian step.** Let z be the optimizer's noise multiplier. The gradients
    get the noise multiplier ``z_g = (z**-2 - (s / count_stddev)**2)**-0.5``, so that both queries together are one
    Gaussian mechanism of multiplier z (theorem 1). s is the sensitivity of the count. It is 1/2 for ADD_OR_REMOVE_ONE
    and REPLACE_SPECIAL, since a sample contributes -1/2 or +1/2, and padding and absence 0. It is 1 for REPLACE_ONE,
    where a contribution can change from -1/2 to +1/2. Without the shift of 1/2 per sample, s would be 1 for every
    relation. Pass z to the accountant; it is ``DPOptimizer.accounted_noise_multiplier``.

    Args:
        initial_norm: C at the first step, positive and finite. It is public, so it must not come from the data.
        target_quantile: Share of the samples to leave unclipped, strictly between 0 and 1.
        learning_rate: Factor in the exponent. With 0.2, C changes by about a tenth per step at most.
        count_stddev: Standard deviation of the noise on the count, in samples. The default is a twentieth of the
            expected batch size, as the paper suggests.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> strategy = AdaptiveQuantile(1.0, target_quantile=0.5, learning_rate=0.2)
        >>> # all 100 samples are clipped
        >>> round(strategy.updated(1.0, noisy_count=-50.0, expected_batch_size=100), 4)
        1.1052
        >>> z_gradients, count_stddev = strategy.noise(1.0, Relation.ADD_OR_REMOVE_ONE, 100)
        >>> round(z_gradients, 4), count_stddev
        (1.005, 5.0)
    """

    initial_norm: float
    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_stddev: float | None = None

    def __post_init__(self) -> None:
        _validate.positive("initial_norm", self.initial_norm)
        if not 0 < _validate.number("target_quantile", self.target_quantile) < 1:
            raise ValueError(
                f"target_quantile must lie strictly between 0 and 1, got {self.target_quantile}; 0.5 clips half of the "
                "samples."
            )
        _validate.positive("learning_rate", self.learning_rate)
        if self.count_stddev is not None:
            _validate.positive("count_stddev", self.count_stddev)

    def updated(self, norm: float, noisy_count: float, expected_batch_size: float) -> float:
        """Return the norm of the next step.

        Args:
            norm: The norm of this step.
            noisy_count: ``sum_i (b_i - 1/2)`` with its noise.
            expected_batch_size: The public constant m.
        """
        share = 0.5 + noisy_count / expected_batch_size
        exponent = -self.learning_rate * (share - self.target_quantile)
        return norm * math.exp(min(exponent, _LARGEST_EXPONENT))

    def noise(
        self, noise_multiplier: float, relation: Relation, expected_batch_size: float
    ) -> tuple[float, float]:
        """Split the noise of one Gaussian mechanism between gradients and count.

        Args:
            noise_multiplier: The noise multiplier of both queries together; with 0 neither gets noise.
            relation: The neighbouring relation.
            expected_batch_size: The public constant m.

        Returns:
            The noise multiplier of the gradients, and the standard deviation of the noise on the count.

        Raises:
            ValueError: If the count alone would reveal more than ``noise_multiplier`` allows.
        """
        if noise_multiplier == 0:
            return 0.0, 0.0
        if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
            raise ValueError(
                f"noise_multiplier must be finite and at least 0, got {noise_multiplier}; 0 means no noise."
            )
        stddev = expected_batch_size / 20 if self.count_stddev is None else float(self.count_stddev)
        sensitivity = most_contributions(relation) / 2
        taken = noise_multiplier * sensitivity / stddev
        if not taken < 1:
            raise ValueError(
                f"AdaptiveQuantile: a count with noise of count_stddev={stddev:.6g} reveals more than "
                f"noise_multiplier={noise_multiplier:.6g} allows, so no noise on the gradients is enough. Give a "
                f"count_stddev above {noise_multiplier * sensitivity:.6g}, best several times that (the default is "
                "expected_batch_size / 20), or a larger expected_batch_size."
            )
        # This is (z^-2 - (s / stddev)^2)^-1/2 without squares that overflow or cancel.
        return noise_multiplier / math.sqrt((1 - taken) * (1 + taken)), stddev
