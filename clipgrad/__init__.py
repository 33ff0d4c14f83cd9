"""clipgrad: exact per-sample gradient clipping at the speed of ordinary training.

>>> import clipgrad
>>> sorted(clipgrad.__all__)[:3]
['AdaptiveQuantile', 'Automatic', 'ClippedGrad']
"""

from __future__ import annotations

from clipgrad import accounting, audit, rules
from clipgrad.batch_norm import replace_batch_norm
from clipgrad.checkpoint import load_checkpoint, save_checkpoint
from clipgrad.clipping import AdaptiveQuantile, Automatic, PerLayer, Relation
from clipgrad.errors import (
    CompileError,
    CompileMismatchError,
    EscapedParameterError,
    NotPerSampleError,
    PrivacyBudgetError,
    UnaccountedBatchError,
    UnclippedGradientError,
)
from clipgrad.exact.noise import DiscreteGaussianNoise
from clipgrad.explain import Explanation
from clipgrad.function import ClippedGrad, clipped_grad
from clipgrad.noise import NoiseSource, SeededNoise, SystemNoise
from clipgrad.optimizer import DPOptimizer
from clipgrad.plan import PrivacyPlan
from clipgrad.profile import StepProfile, profile_step
from clipgrad.result import ClippedGradResult, Diagnostics
from clipgrad.rules import register_decomposition, register_rule, unregister_rule
from clipgrad.sampling import (
    EmptyBatchCollate,
    PaddedBatch,
    PoissonSampler,
    PrivateLoader,
    ShuffledSampler,
    UserSampler,
    poisson_loader,
    shuffled_loader,
    user_loader,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveQuantile",
    "Automatic",
    "ClippedGrad",
    "ClippedGradResult",
    "CompileError",
    "CompileMismatchError",
    "DPOptimizer",
    "Diagnostics",
    "DiscreteGaussianNoise",
    "EmptyBatchCollate",
    "EscapedParameterError",
    "Explanation",
    "NoiseSource",
    "NotPerSampleError",
    "PaddedBatch",
    "PerLayer",
    "PoissonSampler",
    "PrivacyBudgetError",
    "PrivacyPlan",
    "PrivateLoader",
    "Relation",
    "SeededNoise",
    "ShuffledSampler",
    "StepProfile",
    "SystemNoise",
    "UnaccountedBatchError",
    "UnclippedGradientError",
    "UserSampler",
    "accounting",
    "audit",
    "clipped_grad",
    "load_checkpoint",
    "poisson_loader",
    "profile_step",
    "register_decomposition",
    "register_rule",
    "replace_batch_norm",
    "rules",
    "save_checkpoint",
    "shuffled_loader",
    "unregister_rule",
    "user_loader",
]
