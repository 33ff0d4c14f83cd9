"""Gaussian noise. Apart from :mod:`clipgrad.sampling`, the only place where randomness enters.

A :class:`NoiseSource` is the seam: the optimizer holds one and calls nothing else.
:class:`SystemNoise` is the private default: a cipher keyed by the operating system.
:class:`SeededNoise` is repeatable and not private.
"""

from __future__ import annotations

from clipgrad.noise.seeded import SeededNoise
from clipgrad.noise.source import NoiseSource, gaussian_sigma
from clipgrad.noise.system import SystemNoise

__all__ = ["NoiseSource", "SeededNoise", "SystemNoise", "gaussian_sigma"]
