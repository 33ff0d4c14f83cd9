"""``DPOptimizer``, and what it is made of."""

from __future__ import annotations

from clipgrad.optimizer.dp_optimizer import DPOptimizer
from clipgrad.optimizer.run_state import RunState

__all__ = ["DPOptimizer", "RunState"]
