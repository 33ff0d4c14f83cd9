"""Define ``BandedFactorisation``, with which a user chooses banded correlated noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clipgrad.factorisation.optimise import is_stable, optimised
from clipgrad.factorisation.strategy import Strategy, banded
from clipgrad.factorisation.toeplitz import Array, square_root

_KINDS = ("square_root", "optimised")


@dataclass(frozen=True)
class BandedFactorisation:
    """The noise of a step subtracts a part of the noise of the ``bands - 1`` steps before it.

    Each step adds a row of ``C^-1 Z``, where Z is independent Gaussian noise and C a lower-triangular Toeplitz matrix
    with ``bands`` diagonals. Two steps that use the same sample must be at least ``bands`` steps apart. At the same
    epsilon, sums of gradients over many steps have less noise, and single gradients have more (Choquette-Choo et al.,
    "(Amplified) Banded Matrix Factorization", 2023).

    Args:
        bands: Number of diagonals; 1 means independent noise. ``"auto"`` lets ``PrivacyPlan.for_epsilon`` choose the
            number with the least error, up to 64.
        coefficients: ``"optimised"`` finds the best coefficients for the length of the run, and needs SciPy.
            ``"square_root"`` is a closed form with some percent more error.

    Raises:
        ValueError: If ``bands`` is not a positive integer or ``"auto"``, or the name is unknown.

    Examples:
        >>> BandedFactorisation(bands=4, coefficients="square_root").first_column(
        ...     steps=100
        ... ).tolist()
        [1.0, 0.5, 0.375, 0.3125]
    """

    bands: int | str = "auto"
    coefficients: str = "optimised"

    def __post_init__(self) -> None:
        bands = self.bands
        if bands != "auto" and not (type(bands) is int and bands >= 1):
            raise ValueError(
                f"bands must be an integer, at least 1, or 'auto', got {bands!r}; 8, for example."
            )
        if self.coefficients not in _KINDS:
            raise ValueError(
                f"coefficients must be one of {', '.join(map(repr, _KINDS))}, got {self.coefficients!r}."
            )

    def count(self) -> int:
        """Return the number of bands.

        Raises:
            ValueError: If ``bands`` is ``"auto"``.
        """
        if not isinstance(self.bands, int):
            raise ValueError(
                "bands='auto' chooses the number of bands for an epsilon, and there is none. Use "
                "PrivacyPlan.for_epsilon(...), or pass a number of bands."
            )
        return self.bands

    def first_column(self, steps: int) -> Array:
        """Return the first column of C for a run of ``steps`` steps, which begins with 1."""
        bands = min(self.count(), steps)
        column = square_root(bands)
        if self.coefficients == "optimised":
            column = optimised(bands, steps)
        assert column[0] == 1.0
        assert is_stable(column), "rounding errors of the noise would grow"
        return column

    def strategy(self, steps: int, separation: int) -> Strategy:
        """Return the matrix of a run in which two steps of one sample are at least ``separation`` steps apart.

        Raises:
            ValueError: If there are more bands than ``separation``, or ``bands`` is ``"auto"``.
        """
        if self.count() > separation:
            raise ValueError(
                f"bands must be at most {separation}, the number of steps between two steps of a sample, got "
                f"{self.count()}. No sensitivity is proven for more bands; use fewer."
            )
        return banded(self.first_column(steps))

    def with_bands(self, bands: int) -> BandedFactorisation:
        """Return a copy with another number of bands."""
        return replace(self, bands=bands)
