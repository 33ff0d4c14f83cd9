"""clipgrad: exact per-sample gradient clipping at the speed of ordinary training.

What a training loop needs is here. The rest lives in public modules: ``clipgrad.errors``, ``clipgrad.sampling``,
``clipgrad.rules``, ``clipgrad.accounting``, ``clipgrad.audit``, ``clipgrad.noise``, ``clipgrad.profile``,
``clipgrad.testing``.

>>> import clipgrad
>>> sorted(clipgrad.__all__)[:3]
['AdaptiveQuantile', 'Automatic', 'BandedFactorisation']
"""

from __future__ import annotations

from clipgrad import accounting, audit, errors, noise, profile, rules, sampling
from clipgrad.attached_loop import attach
from clipgrad.batch_norm import replace_batch_norm
from clipgrad.checkpoint import load_checkpoint, save_checkpoint
from clipgrad.clipping import AdaptiveQuantile, Automatic, PerLayer, Relation
from clipgrad.exact.noise import DiscreteGaussianNoise
from clipgrad.factorisation import BandedFactorisation, BufferedToeplitz
from clipgrad.function import clipped_grad
from clipgrad.noise import SeededNoise, SystemNoise
from clipgrad.optimizer import DPOptimizer, RunState
from clipgrad.options import Performance
from clipgrad.plan import PrivacyPlan
from clipgrad.profile import profile_step
from clipgrad.sampling import poisson_loader, shuffled_loader, user_loader

__version__ = "0.1.0"

__all__ = [
    "AdaptiveQuantile",
    "Automatic",
    "BandedFactorisation",
    "BufferedToeplitz",
    "DPOptimizer",
    "DiscreteGaussianNoise",
    "PerLayer",
    "Performance",
    "PrivacyPlan",
    "Relation",
    "RunState",
    "SeededNoise",
    "SystemNoise",
    "accounting",
    "attach",
    "audit",
    "clipped_grad",
    "errors",
    "load_checkpoint",
    "noise",
    "poisson_loader",
    "profile",
    "profile_step",
    "replace_batch_norm",
    "rules",
    "sampling",
    "save_checkpoint",
    "shuffled_loader",
    "user_loader",
]
