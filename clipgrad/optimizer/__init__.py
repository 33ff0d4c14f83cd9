"""``DPOptimizer``, and what it is made of."""

from __future__ import annotations

from clipgrad.optimizer.dp_optimizer import DPOptimizer

__all__ = ["DPOptimizer"]
