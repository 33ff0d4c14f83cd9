"""This package makes Gaussian noise. Apart from :mod:`clipgrad.sampling` it is the only source of randomness.

The optimizer holds a :class:`NoiseSource` and calls only its three methods. :class:`SystemNoise`, the private default,
uses a cipher keyed by the operating system. :class:`SeededNoise` is repeatable and not private.
"""

from __future__ import annotations

from clipgrad.noise.seeded import SeededNoise
from clipgrad.noise.source import NoiseSource, gaussian_sigma
from clipgrad.noise.system import SystemNoise

__all__ = ["NoiseSource", "SeededNoise", "SystemNoise", "gaussian_sigma"]
