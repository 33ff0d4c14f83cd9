"""Compute sampling and error of a plan with correlated noise, and refuse settings that exclude such noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from clipgrad import _validate, accounting
from clipgrad.accounting import CyclicPoisson, FixedSize
from clipgrad.clipping import AdaptiveQuantile, ClippingStrategy, Schedule, with_norms
from clipgrad.factorisation import BandedFactorisation, BufferedToeplitz
from clipgrad.factorisation.strategy import Strategy
from clipgrad.factorisation.toeplitz import prefix_sum_norm

Mechanism = BandedFactorisation | BufferedToeplitz
_MOST_BANDS = 64

_WHY_NOT = {
    "max_batch_size": "no amplification is proven for cyclic batches that are cut",
    "declared_sampling": "no check would ensure that each group of samples is used only in its own steps",
    "grid": "correlated noise is not an integer multiple of a grid",
}


def sampling_of(
    mechanism: Mechanism, expected_batch_size: float, num_samples: int, shuffled: bool
) -> CyclicPoisson | FixedSize:
    """Return the sampling of a plan with correlated noise.

    Shuffled passes with one common order use each sample once per pass, and a pass has at least ``bands`` steps. So the
    columns of a sample's steps have no row in common, and each pass costs one Gaussian mechanism, as with independent
    noise (Choquette-Choo et al., "Multi-Epoch Matrix Factorization Mechanisms", 2023). No amplification is claimed. A
    matrix without bands has larger noise, so that a number of passes costs no more than the same number of mechanisms.
    """
    if shuffled:
        return FixedSize(num_samples, int(expected_batch_size))
    assert isinstance(mechanism, BandedFactorisation)
    bands = mechanism.count()
    return CyclicPoisson(expected_batch_size * bands / num_samples, bands)


def refuse_uncorrelatable(
    mechanism: Mechanism | None,
    *,
    shuffled: bool,
    num_samples: int,
    expected_batch_size: float,
    noise_multiplier: float | Schedule,
    max_grad_norm: ClippingStrategy,
    others: Mapping[str, object],
) -> None:
    """Refuse settings with which no privacy of correlated noise is proven.

    Args:
        mechanism: The plan's mechanism; None means independent noise, for which the call does nothing.
        shuffled: The plan's argument of this name, as the next four are.
        num_samples: Number of samples.
        expected_batch_size: Expected batch size.
        noise_multiplier: Noise multiplier.
        max_grad_norm: Clipping norm.
        others: Further settings by name, which must be None.

    Raises:
        TypeError: If ``mechanism`` has another type.
        ValueError: If a setting excludes correlated noise.
    """
    if mechanism is None:
        return
    if not isinstance(mechanism, Mechanism):
        raise TypeError(
            f"mechanism must be a clipgrad.BandedFactorisation or BufferedToeplitz, got {mechanism!r}. Pass None for "
            "independent noise."
        )
    if isinstance(mechanism, BufferedToeplitz) and not shuffled:
        raise ValueError(
            f"mechanism={mechanism!r} needs shuffled=True: its matrix has no bands, so no amplification by sampling "
            "is proven. Use BandedFactorisation for Poisson batches."
        )
    bands = mechanism.count() if isinstance(mechanism, BandedFactorisation) else 1
    most = math.floor(num_samples / expected_batch_size)
    if bands > most:
        raise ValueError(
            f"bands must be at most num_samples / expected_batch_size = {most}, got {bands}: a group of "
            f"{num_samples / bands:g} samples does not fill a batch. Use fewer bands or smaller batches."
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} excludes mechanism={mechanism!r}: {_WHY_NOT[name]}. Leave one of them out."
            )
    if callable(noise_multiplier):
        raise ValueError(
            "noise_multiplier must be a number with correlated noise, got a function of the step: later steps subtract "
            "noise of earlier steps. Pass a number, or leave mechanism out."
        )

    def constant(norm: object) -> float:
        if callable(norm) or isinstance(norm, AdaptiveQuantile):
            raise ValueError(
                f"max_grad_norm must be constant with correlated noise, got {norm!r}: the sensitivity of the whole run "
                "is computed from one norm. Pass a number, or leave mechanism out."
            )
        return 1.0

    with_norms(max_grad_norm, constant)


def error_of(strategy: Strategy | None, noise: Sequence[float]) -> float:
    """Return the root mean square of the noise in prefix sums.

    Args:
        strategy: The matrix of correlated noise; None means independent noise.
        noise: The noise multiplier of each step.
    """
    if strategy is not None:
        spread = prefix_sum_norm(np.array(strategy.column), len(noise))
        return noise[0] * strategy.scale * spread
    return math.sqrt(float(np.cumsum(np.square(noise)).mean()))


def best_bands(
    mechanism: BandedFactorisation,
    target_epsilon: float,
    *,
    num_samples: int,
    expected_batch_size: float,
    steps: int,
    delta: float,
    shuffled: bool,
) -> BandedFactorisation:
    """Return the mechanism with the number of bands whose prefix sums have the least error at ``target_epsilon``.

    Renyi accounting finds the noise of each candidate; it is fast and orders them nearly as tight accounting does.
    Candidates are powers of two and 1.5 times a power of two, at most 64, since each band keeps a copy of the model.
    """
    size = _validate.positive("expected_batch_size", expected_batch_size)
    most = min(steps, math.floor(num_samples / size), _MOST_BANDS)
    errors: dict[int, float] = {}

    def error(bands: int) -> float:
        if bands not in errors:
            noise = accounting.noise_multiplier(
                target_epsilon=target_epsilon,
                sampling=sampling_of(mechanism.with_bands(bands), size, num_samples, shuffled),
                steps=steps,
                delta=delta,
                accountant="rdp",
                # With replace_one both noise and sensitivity double, so candidates keep their order.
                relation="replace_special",
            )
            strategy = mechanism.with_bands(bands).strategy(steps, most)
            errors[bands] = error_of(strategy, [noise] * steps)
        return errors[bands]

    bands = 1
    # The error decreases to its minimum and increases after it; two increases in a row end the search.
    while bands <= most and not (
        bands > 2 and error(bands // 2) > error(bands // 4) and error(bands) > error(bands // 2)
    ):
        error(bands)
        bands *= 2
    best = min(errors, key=errors.__getitem__)
    for near in (3 * best // 4, 3 * best // 2):
        if 1 <= near <= most:
            error(near)
    return mechanism.with_bands(min(errors, key=errors.__getitem__))
