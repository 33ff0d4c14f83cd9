"""This package computes what a training run reveals: epsilon at a given delta, and the noise that an epsilon needs.

The mathematics is Google's ``dp-accounting``; this package describes the run to it. Every step adds Gaussian noise to a
sum of clipped gradients. Its cost depends on how its batch was sampled: :class:`Poisson`, :class:`TruncatedPoisson`,
:class:`FixedSize`, :class:`FullBatch` or :class:`CyclicPoisson`. A plain ``sample_rate=`` means :class:`Poisson`, as
sampled by :class:`clipgrad.sampling.PoissonSampler`; its figures do not hold for shuffled batches. No figure covers
other computations on the data, such as the tuning of hyperparameters or statistics for normalisation.

:func:`epsilon`, :func:`noise_multiplier` and :func:`steps` plan a run of equal steps. A :class:`Ledger` adds up the
steps that were released, also with changing noise or sampling.

All accountants give upper bounds. ``"pld"``, privacy loss distributions (Doroshenko et al., "Connect the Dots", 2022),
is tight and takes a fraction of a second; it resolves no delta below 1e-12 and returns an infinite epsilon there.
``"rdp"``, Renyi differential privacy (Mironov, Talwar and Zhang, "Renyi Differential Privacy of the Sampled Gaussian
Mechanism", 2019), gives an epsilon about a tenth higher. It caches the single step, so a query with more steps, as for
a progress bar, takes a tenth of a millisecond. ``"rdp_integer"`` is ``"rdp"`` at integer orders only, where it also
holds for the discrete Gaussian noise of exact mode (``grid=``).
"""

# Imports here are relative, so that the package can be loaded on its own, without importing torch.
from __future__ import annotations

from ._checks import Accountant
from ._entries import Entry
from ._ledger import Ledger
from ._run import epsilon, noise_multiplier, steps
from ._sampling import (
    CyclicPoisson,
    FixedSize,
    FullBatch,
    Poisson,
    Sampling,
    TruncatedPoisson,
    require_supported,
)

__all__ = [
    "Accountant",
    "CyclicPoisson",
    "Entry",
    "FixedSize",
    "FullBatch",
    "Ledger",
    "Poisson",
    "Sampling",
    "TruncatedPoisson",
    "epsilon",
    "noise_multiplier",
    "require_supported",
    "steps",
]
