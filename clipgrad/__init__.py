"""clipgrad: exact per-sample gradient clipping at the speed of ordinary training.

>>> import clipgrad
>>> sorted(clipgrad.__all__)[:3]
['ClippedGrad', 'ClippedGradResult', 'DPOptimizer']
"""

from __future__ import annotations

from clipgrad import rules
from clipgrad.clipping import Relation
from clipgrad.errors import EscapedParameterError, NotPerSampleError, UnclippedGradientError
from clipgrad.explain import Explanation
from clipgrad.optimizer import Diagnostics, DPOptimizer
from clipgrad.rules import register_decomposition, register_rule, unregister_rule
from clipgrad.transform import ClippedGrad, ClippedGradResult, clipped_grad

__version__ = "0.1.0"

__all__ = [
    "ClippedGrad",
    "ClippedGradResult",
    "DPOptimizer",
    "Diagnostics",
    "EscapedParameterError",
    "Explanation",
    "NotPerSampleError",
    "Relation",
    "UnclippedGradientError",
    "clipped_grad",
    "register_decomposition",
    "register_rule",
    "rules",
    "unregister_rule",
]
