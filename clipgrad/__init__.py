"""clipgrad: exact per-sample gradient clipping at the speed of ordinary training.

>>> import clipgrad
>>> sorted(clipgrad.__all__)[:3]
['AdaptiveQuantile', 'Automatic', 'ClippedGrad']
"""

from __future__ import annotations

from clipgrad import accounting, rules
from clipgrad.batch_norm import replace_batch_norm
from clipgrad.clipping import AdaptiveQuantile, Automatic, PerLayer, Relation
from clipgrad.errors import (
    CompileError,
    CompileMismatchError,
    EscapedParameterError,
    NotPerSampleError,
    UnclippedGradientError,
)
from clipgrad.explain import Explanation
from clipgrad.noise import NoiseSource, SeededNoise, SystemNoise
from clipgrad.optimizer import Diagnostics, DPOptimizer
from clipgrad.profile import StepProfile, profile_step
from clipgrad.result import ClippedGradResult
from clipgrad.rules import register_decomposition, register_rule, unregister_rule
from clipgrad.sampling import (
    EmptyBatchCollate,
    PaddedBatch,
    PoissonLoader,
    PoissonSampler,
    UserSampler,
    poisson_loader,
    user_loader,
)
from clipgrad.transform import ClippedGrad, clipped_grad

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
    "EmptyBatchCollate",
    "EscapedParameterError",
    "Explanation",
    "NoiseSource",
    "NotPerSampleError",
    "PaddedBatch",
    "PerLayer",
    "PoissonLoader",
    "PoissonSampler",
    "Relation",
    "SeededNoise",
    "StepProfile",
    "SystemNoise",
    "UnclippedGradientError",
    "UserSampler",
    "accounting",
    "clipped_grad",
    "poisson_loader",
    "profile_step",
    "register_decomposition",
    "register_rule",
    "replace_batch_norm",
    "rules",
    "unregister_rule",
    "user_loader",
]
