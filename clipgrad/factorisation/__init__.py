"""Choose how noise is correlated over steps: coefficients, sensitivity and error. Imports neither torch nor SciPy."""

from __future__ import annotations

from clipgrad.factorisation.banded import BandedFactorisation
from clipgrad.factorisation.buffered import BufferedToeplitz

__all__ = ["BandedFactorisation", "BufferedToeplitz"]
