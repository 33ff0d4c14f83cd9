"""clipgrad: exact per-sample gradient clipping at the speed of ordinary training."""

from __future__ import annotations

from clipgrad import rules
from clipgrad.clipping import Relation
from clipgrad.transform import ClippedGrad, ClippedGradResult, clipped_grad

__version__ = "0.1.0"
__all__ = ["ClippedGrad", "ClippedGradResult", "Relation", "clipped_grad", "rules"]
