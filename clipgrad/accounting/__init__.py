"""What a training run reveals: epsilon at a given delta, and the noise that a given epsilon needs.

The mathematics is Google's ``dp-accounting``; this package describes the run to it. Every step adds
Gaussian noise to a sum of clipped gradients, and how its batch was drawn decides what that costs:
:class:`Poisson`, :class:`TruncatedPoisson`, :class:`FixedSize` and :class:`FullBatch` say it. A plain
``sample_rate=`` means :class:`Poisson`, what :class:`clipgrad.sampling.PoissonSampler` draws; for
shuffled batches its figures do not hold. Nor do any cover what else was computed from the data:
hyperparameters tuned on it, statistics for its normalisation.

:func:`epsilon`, :func:`noise_multiplier` and :func:`steps` plan a run of equal steps; a
:class:`Ledger` adds up what has been released, whatever changed on the way.

Two accountants: ``"pld"``, privacy loss distributions (Doroshenko et al., "Connect the Dots",
2022), takes a fraction of a second and is tight; it resolves no delta below 1e-12 and calls epsilon
infinite there. ``"rdp"``, Renyi differential privacy (Mironov, Talwar and Zhang, "Renyi
Differential Privacy of the Sampled Gaussian Mechanism", 2019), comes out about a tenth higher and
remembers the single step: asking again with more steps, as a progress bar does, costs a tenth of a
millisecond. Both are upper bounds. ``"rdp_integer"`` is the second at whole orders only, where it holds
for the discrete Gaussian noise of the exact mode too (``grid=``).
"""

# Imports here are relative, so that the package can be loaded on its own, without clipgrad's torch.
from __future__ import annotations

from ._checks import Accountant
from ._entries import Entry
from ._ledger import Ledger
from ._run import epsilon, noise_multiplier, steps
from ._sampling import FixedSize, FullBatch, Poisson, Sampling, TruncatedPoisson, require_supported

__all__ = [
    "Accountant",
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
