"""Compute coefficients, sensitivity and error of noise that is correlated over steps, without importing torch."""

from __future__ import annotations

from clipgrad.factorisation.banded import BandedFactorisation
from clipgrad.factorisation.buffered import BufferedToeplitz

__all__ = ["BandedFactorisation", "BufferedToeplitz"]
